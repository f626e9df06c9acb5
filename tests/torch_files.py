"""PyTorch checkpoints of tiny models, spelled out key by key."""

import torch


def swag_state(*, depth=2, width=6, mlp=10, positions=10, patch=4, classes=3, seed=0):
    """A SWAG state dict with random numbers; no head if `classes` is 0."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "class_token": (1, 1, width),
        "conv_proj.weight": (width, 3, patch, patch),
        "conv_proj.bias": (width,),
        "encoder.pos_embedding": (positions, 1, width),
    }
    for i in range(depth):
        block = f"encoder.layers.layer_{i}"
        shapes |= {
            f"{block}.ln_1.weight": (width,),
            f"{block}.ln_1.bias": (width,),
            f"{block}.self_attention.in_proj_weight": (3 * width, width),
            f"{block}.self_attention.in_proj_bias": (3 * width,),
            f"{block}.self_attention.out_proj.weight": (width, width),
            f"{block}.self_attention.out_proj.bias": (width,),
            f"{block}.ln_2.weight": (width,),
            f"{block}.ln_2.bias": (width,),
            f"{block}.mlp.linear_1.weight": (mlp, width),
            f"{block}.mlp.linear_1.bias": (mlp,),
            f"{block}.mlp.linear_2.weight": (width, mlp),
            f"{block}.mlp.linear_2.bias": (width,),
        }
    shapes |= {"encoder.ln.weight": (width,), "encoder.ln.bias": (width,)}
    if classes:
        shapes |= {
            "head.layers.head.weight": (classes, width),
            "head.layers.head.bias": (classes,),
        }
    return {key: torch.randn(shape, generator=generator) for key, shape in shapes.items()}


def as_torchvision(state, *, older=False):
    """The same weights as torchvision names and shapes them."""
    names = {
        "layers.layer_": "layers.encoder_layer_",
        "head.layers.head": "heads.head",
        **({} if older else {"mlp.linear_1": "mlp.0", "mlp.linear_2": "mlp.3"}),
    }
    renamed = {}
    for key, tensor in state.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed[key] = tensor.transpose(0, 1) if key == "encoder.pos_embedding" else tensor
    return renamed


def save(state, path):
    """Write a file and give its path."""
    torch.save(state, path)
    return path
