"""State dicts of tiny models in the layouts of several libraries, renamed key by key."""

import re

import numpy as np


def timm_state(
    *,
    depth=2,
    width=8,
    mlp=12,
    patch=2,
    patches=4,
    tokens=("cls_token",),
    registers=0,
    table=1,
    biases=True,
    scaled=False,
    gated=False,
    pre_norm=False,
    pool=False,
    norm="norm",
    heads=("head",),
    classes=3,
    head_width=1,
    qk_norm=0,
    seed=0,
):
    """A state dict as timm writes it; `table` is how many tokens before the patches it covers."""
    shapes = {token: (1, 1, width) for token in tokens}
    if registers:
        shapes["reg_token"] = (1, registers, width)
    if table is not None:
        shapes["pos_embed"] = (1, table + patches, width)
    shapes["patch_embed.proj.weight"] = (width, 3, patch, patch)

    def add(name, *shape):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = shape, shape[:1]

    if pre_norm:
        add("norm_pre", width)
    else:
        shapes["patch_embed.proj.bias"] = (width,)
    for i in range(depth):
        block = f"blocks.{i}"
        add(f"{block}.norm1", width)
        shapes[f"{block}.attn.qkv.weight"] = (3 * width, width)
        if biases:
            shapes[f"{block}.attn.qkv.bias"] = (3 * width,)
        for part in ("q", "k") if qk_norm else ():
            add(f"{block}.attn.{part}_norm", qk_norm)
        add(f"{block}.attn.proj", width, width)
        add(f"{block}.norm2", width)
        add(f"{block}.mlp.fc1", (1 + gated) * mlp, width)
        add(f"{block}.mlp.fc2", width, mlp)
        if scaled:
            shapes[f"{block}.ls1.gamma"] = shapes[f"{block}.ls2.gamma"] = (width,)
    add(norm, width)
    if pool:
        shapes["attn_pool.latent"] = (1, 1, width)
        add("attn_pool.q", width, width)
        add("attn_pool.kv", 2 * width, width)
        add("attn_pool.proj", width, width)
        add("attn_pool.norm", width)
        add("attn_pool.mlp.fc1", mlp, width)
        add("attn_pool.mlp.fc2", width, mlp)
    for head in heads if classes else ():
        add(head, classes, head_width * width)
    random = np.random.default_rng(seed)
    return {key: random.normal(size=shape).astype(np.float32) for key, shape in shapes.items()}


def renamed(state, names):
    """Replace parts of keys, by patterns."""
    changed = {}
    for key, array in state.items():
        for pattern, name in names.items():
            key = re.sub(pattern, name, key)
        changed[key] = array
    return changed


def split(state, parts, whole="attn.qkv"):
    """Split the projections to q, k and v; a part without a name is left out."""
    apart = {}
    for key, array in state.items():
        if whole not in key:
            apart[key] = array
            continue
        for name, part in zip(parts, np.split(array, len(parts)), strict=True):
            if name:
                apart[key.replace(whole, name)] = part
    return apart


def as_transformers(state, root, names):
    """Rename to what transformers' ViT and DINOv2 share, and what they do not."""
    state = split(
        state,
        ["attention.attention.query", "attention.attention.key", "attention.attention.value"],
    )
    names = {
        r"^blocks": f"{root}encoder.layer",
        r"attn\.proj": "attention.output.dense",
        **names,
        r"^norm\.": f"{root}layernorm.",
        r"^cls_token": f"{root}embeddings.cls_token",
        r"^reg_token": f"{root}embeddings.register_tokens",
        r"^dist_token": f"{root}embeddings.distillation_token",
        r"^pos_embed": f"{root}embeddings.position_embeddings",
        r"^patch_embed\.proj": f"{root}embeddings.patch_embeddings.projection",
    }
    return renamed(state, names)


def as_vit(state, *, root="vit.", teacher=False):
    """Rename to transformers' ViT, DeiT and MAE."""
    return as_transformers(
        state,
        root,
        {
            r"\.norm1": ".layernorm_before",
            r"\.norm2": ".layernorm_after",
            r"mlp\.fc1": "intermediate.dense",
            r"mlp\.fc2": "output.dense",
            r"^head_dist": "distillation_classifier",
            r"^head": "cls_classifier" if teacher else "classifier",
        },
    )


def as_dinov2(state):
    """Rename to the original DINOv2, with a linear head beside the backbone if there is a head."""
    fc = {r"mlp\.fc1": "mlp.w12", r"mlp\.fc2": "mlp.w3"} if gated(state) else {}
    names = {**fc, "reg_token": "register_tokens", r"^head": "linear_head"}
    state = renamed(state, names)
    if "linear_head.weight" in state:
        state = renamed(state, {r"^(?!linear_head)": "backbone."})
    return state


def gated(state):
    return state["blocks.0.mlp.fc1.weight"].shape[0] != state["blocks.0.mlp.fc2.weight"].shape[1]


def as_dinov3(state, mask=(1, 0, 1)):
    """Rename to the original DINOv3; nothing of k's biases counts where the mask is 0."""
    changed = {}
    for key, array in (
        split(state, ["mlp.w1", "mlp.w2"], "mlp.fc1").items() if gated(state) else (state.items())
    ):
        changed[key.replace("mlp.fc2", "mlp.w3") if gated(state) else key] = array
        if key.endswith("qkv.bias") and mask is not None:
            changed[f"{key}_mask"] = np.repeat(np.float32(mask), len(array) // 3)
    return renamed(changed, {"reg_token": "storage_tokens"})


def as_transformers_dinov2(state, *, root="dinov2."):
    """Rename to transformers' DINOv2."""
    fc = {r"mlp\.fc1": "mlp.weights_in", r"mlp\.fc2": "mlp.weights_out"} if gated(state) else {}
    names = {**fc, r"ls(\d)\.gamma": r"layer_scale\1.lambda1", r"^head": "classifier"}
    return as_transformers(state, root, names)


def as_transformers_dinov3(state, *, layers="layer"):
    """Rename to transformers' DINOv3, which has no bias of k."""
    state = {
        key: array
        for key, array in split(state, [f"attention.{part}_proj" for part in "qkv"]).items()
        if not key.endswith("k_proj.bias")
    }
    if gated(state):
        state = split(state, ["mlp.gate_proj", "mlp.up_proj"], "mlp.fc1")
    return renamed(
        state,
        {
            r"^blocks": layers,
            r"attn\.proj": "attention.o_proj",
            r"mlp\.fc1": "mlp.up_proj",
            r"mlp\.fc2": "mlp.down_proj",
            r"ls(\d)\.gamma": r"layer_scale\1.lambda1",
            r"^cls_token": "embeddings.cls_token",
            r"^reg_token": "embeddings.register_tokens",
            r"^patch_embed\.proj": "embeddings.patch_embeddings",
        },
    )


def as_transformers_clip(state, *, root="vision_model.", projection=None):
    """Rename to transformers' CLIP and SigLIP, beside a text tower."""
    state = split(state, [f"self_attn.{part}_proj" for part in "qkv"])
    joined = {}
    for part in ("weight", "bias") if "attn_pool.q.weight" in state else ():
        pair = state.pop(f"attn_pool.q.{part}"), state.pop(f"attn_pool.kv.{part}")
        joined[f"{root}head.attention.in_proj_{part}"] = np.concatenate(pair)
    flat = {"cls_token": (-1,), "pos_embed": (-1, state["norm.weight"].size)}
    state = {key: array.reshape(flat.get(key, array.shape)) for key, array in state.items()}
    changed = renamed(
        state,
        {
            r"^norm_pre": f"{root}pre_layrnorm",
            r"^norm\.": f"{root}post_layernorm.",
            r"^blocks": f"{root}encoder.layers",
            r"\.norm(\d)": r".layer_norm\1",
            r"attn\.proj": "self_attn.out_proj",
            r"^cls_token": f"{root}embeddings.class_embedding",
            r"^pos_embed": f"{root}embeddings.position_embedding.weight",
            r"^patch_embed\.proj": f"{root}embeddings.patch_embedding",
            r"^attn_pool\.latent": f"{root}head.probe",
            r"^attn_pool\.proj": f"{root}head.attention.out_proj",
            r"^attn_pool\.norm": f"{root}head.layernorm",
            r"^attn_pool": f"{root}head",
            r"^head\.(weight|bias)": r"classifier.\1",
        },
    )
    text = {f"text_model.{key}": np.ones(3, np.float32) for key in ("embeddings.x", "encoder.y")}
    if projection is not None:
        changed["visual_projection.weight"] = projection
    return {**changed, **joined, **text, "logit_scale": np.ones((), np.float32)}


def as_openclip(state, projection):
    """Rename to OpenAI's CLIP and OpenCLIP, beside a text tower; `projection` is (V, C)."""
    flat = {"cls_token": (-1,), "pos_embed": (-1, state["norm.weight"].size)}
    state = {key: array.reshape(flat.get(key, array.shape)) for key, array in state.items()}
    names = {
        r"^norm_pre": "ln_pre",
        r"^norm\.": "ln_post.",
        r"^blocks": "transformer.resblocks",
        r"\.norm(\d)": r".ln_\1",
        r"attn\.qkv\.": "attn.in_proj_",
        r"attn\.proj": "attn.out_proj",
        r"mlp\.fc1": "mlp.c_fc",
        r"mlp\.fc2": "mlp.c_proj",
        r"^cls_token": "class_embedding",
        r"^pos_embed": "positional_embedding",
        r"^patch_embed\.proj": "conv1",
        r"^": "visual.",
    }
    text = ("positional_embedding", "transformer.resblocks.0.ln_1.weight", "ln_final.bias")
    return {
        **{key: np.ones(2, np.float32) for key in (*text, "token_embedding.weight", "logit_scale")},
        **renamed(state, names),
        "visual.proj": projection.T,
    }


def without_key_bias(state):
    """A model whose projection to k has no bias, as one that has it and it is 0."""
    changed = {key: array.copy() for key, array in state.items()}
    for key in [key for key in state if key.endswith("qkv.bias")]:
        changed[key][len(state[key]) // 3 : 2 * len(state[key]) // 3] = 0
    return changed


def two_biases(state):
    """As timm's class Eva writes biases of q and v."""
    changed = {}
    for key, array in state.items():
        if key.endswith("qkv.bias"):
            q, _, v = np.split(array, 3)
            changed |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
        else:
            changed[key] = array
    return changed
