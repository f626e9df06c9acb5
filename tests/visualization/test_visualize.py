import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import hvit_jax
from hvit_jax import InputError, demo
from hvit_jax.commands.visualize import main
from hvit_jax.config import Rope
from hvit_jax.data.picture import ORIENTATION
from hvit_jax.data.preprocess import normalize, resize_and_crop
from hvit_jax.pictures import Preprocessing
from hvit_jax.visualization import VisualizeConfig, visualize
from hvit_jax.visualization.draw import SHADE, draw_groups, enlarged, heat_map, lay_over
from hvit_jax.visualization.run import INCHES, MOST_PANELS
from hvit_jax.visualization.view import compile_views
from tests.evaluation_setup import make_checkpoint
from tests.reducers.test_contract import METHODS, make
from tests.small_models import build, compute_features, sharp_parameters, with_registers

PICTURES = sorted(str(path) for path in (demo.FOLDER / "pictures").glob("*.jpg"))


@pytest.fixture(scope="module")
def pixels(small_config):
    shape = (2, *small_config.image_shape, 3)
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.slow_for("pitome", "tofu", "diffrate", "atc", "random", "pool")
@pytest.mark.parametrize("method", METHODS)
def test_views_of_every_method(method, small_config, pixels):
    model = make(small_config, method)
    blocks, schedule = (1, 2), model.reducer.schedule(small_config)
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"):
        views, output = compile_views(model, blocks)(pixels)
    np.testing.assert_allclose(output, hvit_jax.jit_model(model)(normalize(pixels)), atol=2e-5)
    for layer, view in zip((schedule[block] for block in blocks), views, strict=True):
        assert view.groups.shape == view.attention.shape == (2, small_config.num_patches)
        assert view.groups.min() >= -1
        tokens = [len(np.unique(groups[groups >= 0])) for groups in np.asarray(view.groups)]
        assert all(0 < count < max(layer.tokens_in, layer.tokens_out) for count in tokens)
        if method == "ats":
            assert view.tokens.tolist() == [count + 1 for count in tokens]
        else:
            assert view.tokens.tolist() == [layer.tokens_out] * 2
        total = np.asarray(view.attention).sum(1)
        assert (view.attention >= 0).all() and (0.5 < total).all()
        # CLS and itself need not be in one cluster.
        assert (total < (1.00001 if method == "smyrf" else 1)).all()


def test_attention_is_the_row_of_cls(small_config, pixels):
    """Compare with softmax written out, in the first block of the dense model."""
    model = hvit_jax.create(small_config, seed=1)
    (view,), _ = compile_views(model, [0])(pixels)
    x, _ = model.embed(normalize(pixels), trace=True)
    q, k, _ = (each.array for each in model.block_at(0)[0].qkv(x))
    scores = np.einsum("bhd,bnhd->bhn", q[:, 0], k) / small_config.head_dim**0.5
    weights = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
    np.testing.assert_allclose(view.attention, weights.mean(1)[:, 1:], atol=1e-6)


@pytest.mark.parametrize(
    ("method", "class_token", "options"),
    [
        *[("tome", True, {"r": 6}), ("act", True, {"q_hashes": 8, "group_keys": True})],
        *[("smyrf", True, {"rounds": 4, "q_cluster_size": 10, "k_cluster_size": 10})],
        *[("evo", False, {"prune_location": 1}), ("tome_dense", True, {})],
        *[("pool", False, {"pool_location": 1}), ("mctf", True, {"r": 9, "one_step_ahead": 2})],
    ],
)
def test_attention_is_what_the_block_computes_with(
    method, class_token, options, small_config, pixels
):
    """With one head and rotary positions: the weights of the values in what the block attends."""
    switches = {"depth": 2, "registers": 0, "rope": Rope.spaced(32), "heads": 1, "pool": "avg"}
    config = with_registers(small_config, **switches, class_token=class_token)
    model = build(config, sharp_parameters(config, 4), method=method, **options)

    @jax.jit
    def run(images):
        features = model.features(images)
        block, layer, draws = model.block_at(1)
        values, attended, qkv, project = [], [], block.project_qkv, block.project
        source = model.reducer.attended_source(block, features.tokens[0], *features.states, layer)
        block.project_qkv = lambda *inputs, **_: values.append(qkv(*inputs)) or values[-1]
        block.project = lambda out: attended.append(out) or project(out)
        model.reducer.block(block, features.tokens[0], features.states[0], layer, draws)
        return values[-1][2].array[:, :, 0], attended[0][:, :, 0], source

    (view,), _ = compile_views(model, [1])(pixels)
    arrays = jax.device_get((*run(normalize(pixels)), view.attention))
    for v, out, source, attention in zip(*arrays, strict=True):
        held = (source >= 0) & (source < len(v))
        found = attention[held] @ v[source[held]]
        if class_token:  # What CLS gives to itself is not shown.
            found, expected = found + (1 - attention.sum()) * v[0], out[0]
        else:
            expected = out[source[held]].mean(0)
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_merged_tokens_share_their_attention(small_config, pixels):
    model = make(small_config, "tome")
    views, _ = compile_views(model, [1])(pixels)
    before = np.asarray(compute_features(model, normalize(pixels)).states[0].source)
    attention = np.asarray(views[0].attention)
    for image in range(2):
        pair = np.flatnonzero(np.bincount(before[image]) > 1)[0]
        shares = attention[image][before[image] == pair]
        assert len(shares) > 1 and np.ptp(shares) == 0


def test_left_out_patches_get_no_attention(small_config, pixels):
    views, _ = compile_views(make(small_config, "evo"), [2])(pixels)
    groups, attention = (np.asarray(part) for part in (views[0].groups, views[0].attention))
    assert (groups < 0).sum() == 2 * small_config.num_patches // 2
    np.testing.assert_array_equal(groups < 0, attention == 0)


def test_every_block_can_be_taken_out(small_config):
    model = hvit_jax.create(small_config, "evit", seed=1, drop_locations=(2,))
    x, state = model.embed(jnp.ones((1, *small_config.image_shape, 3)), trace=True)
    for index in range(small_config.depth):
        block, layer, draws = model.block_at(index)
        x, state = model.reducer.block(block, x, state, layer, draws)
    expected = compute_features(model, jnp.ones((1, *small_config.image_shape, 3))).tokens[-1]
    np.testing.assert_allclose(x, expected, atol=1e-5)
    with pytest.raises(IndexError, match="0 to 3"):
        model.block_at(4)


def test_refuses_blocks_that_are_not_there(small_config):
    with pytest.raises(InputError, match="block 4: the model's blocks are 0 to 3"):
        compile_views(hvit_jax.create(small_config), [4])


def test_draws_groups_single_and_dropped_patches():
    pixels = np.zeros((24, 48, 3), np.uint8)
    pixels[:, :12], pixels[:, 12:24] = 200, 100
    pixels[0, 24], pixels[:, 36:] = 255, 50
    # Two merged patches, one on its own, one dropped; then the same below, all on their own.
    groups = np.array([7, 7, 3, -1, 1, 2, 4, 5])
    drawing = draw_groups(pixels, groups, (2, 4))
    assert drawing.shape == pixels.shape
    np.testing.assert_array_equal(drawing[:11, :23], 150)
    np.testing.assert_array_equal(drawing[1:11, 25:36], 0)
    np.testing.assert_array_equal(drawing[0, 24], 255)
    np.testing.assert_array_equal(drawing[5, 40], np.array(SHADE) + 11)
    np.testing.assert_array_equal(drawing[13:, :12], 200)
    # An outline below and to the right of the merged pair, and nowhere else.
    np.testing.assert_array_equal(drawing[12, :24], 255)
    np.testing.assert_array_equal(drawing[:12, 24], 255)
    np.testing.assert_array_equal(drawing[14:, 24:36], 0)


def test_heat_maps_are_bounded_and_in_place():
    attention = np.zeros(48)
    attention[9] = 0.5
    heat = heat_map(attention, (6, 8), (48, 64))
    assert heat.shape == (48, 64) and heat.min() >= 0 and heat.max() <= 1
    assert np.unravel_index(heat.argmax(), heat.shape)[0] // 8 == 1
    assert np.unravel_index(heat.argmax(), heat.shape)[1] // 8 == 1
    assert (heat_map(np.zeros(48), (6, 8), (48, 64)) == 0).all()


def test_heat_goes_from_dark_to_light_over_the_picture():
    picture = np.full((2, 5, 3), 100, np.uint8)
    heat = np.broadcast_to(np.linspace(0, 1, 5), (2, 5))
    drawing = lay_over(picture, heat)
    assert drawing.shape == picture.shape and drawing.dtype == np.uint8
    assert (np.diff(drawing[0].astype(int).sum(-1)) > 0).all()
    np.testing.assert_array_equal(drawing[0, 0], [65, 65, 66])
    np.testing.assert_array_equal(drawing[0, -1], np.round(15 + 0.85 * np.array([252, 255, 164])))


def test_enlarges_by_whole_numbers():
    assert enlarged((56, 56)) == (616, 616)
    assert enlarged((48, 64)) == (480, 640)
    assert enlarged((2000, 1000)) == (2000, 1000)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, small_config):
    return str(make_checkpoint(tmp_path_factory.mktemp("small") / "checkpoint", small_config))


def test_draws_a_method(tmp_path, capfd, checkpoint):
    out = tmp_path / "out.PNG"
    words = ["--checkpoint", checkpoint, "--method", "evit", "--after", "1,2"]
    assert main([*PICTURES[:2], *words, "-o", str(out)]) == 0
    with Image.open(out) as picture:
        assert picture.width > picture.height > 300
    assert capfd.readouterr().out == f"written: {out}\n"


def test_pictures_are_upright_and_prepared_as_the_checkpoint_says(tmp_path, small_config):
    own = Preprocessing(crop_mode="squash", mean=(0.1, 0.2, 0.3))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", small_config, preprocessing=own)
    upright = Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 20, 3), np.uint8))
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    turned = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    method = hvit_jax.make_reducer("evit", drop_locations=(1,))
    config = VisualizeConfig(
        images=(str(turned),), output=tmp_path / "out.png", checkpoint=checkpoint, reducer=method
    )
    ((first, *views),) = visualize(config)
    large = enlarged(small_config.image_shape)
    np.testing.assert_array_equal(first.drawing, resize_and_crop(upright, large, own))
    # Kept patches are those that get most of CLS's attention in the normalised picture.
    pixels = resize_and_crop(upright, small_config.image_shape, own)[None]
    model = hvit_jax.load(checkpoint, method)
    features = hvit_jax.jit_model(model).features(normalize(pixels, own.mean, own.std))
    block, layer, draws = model.block_at(3)
    groups = model.reducer.groups(block, features.tokens[2], features.states[3], layer, draws)
    drawing = draw_groups(first.drawing, np.asarray(groups[0]), small_config.grid)
    np.testing.assert_array_equal(views[-2].drawing, drawing)


@pytest.mark.parametrize(
    ("words", "name"), [((), "evit"), (("--method", "dense"), "dense"), (("-n", "4"), "hourglass")]
)
def test_a_checkpoint_trained_with_a_method(tmp_path, small_config, capfd, words, name):
    """It is drawn with that method; hourglass, the usual one, has option -n."""
    evit = hvit_jax.make_reducer("evit", drop_locations=(1,))
    checkpoint = make_checkpoint(tmp_path / "checkpoint", small_config, trained=evit)
    out = tmp_path / "out.svg"
    assert main([PICTURES[0], "--checkpoint", str(checkpoint), "-o", str(out), *words]) == 0
    told = "trained with evit drop_locations=1, which is used" in capfd.readouterr().err
    assert told is (name == "evit")
    assert f"<!-- {name}" in out.read_text()


@pytest.mark.parametrize(("words", "warned"), [((), True), (("--max-tokens", "9"), False)])
def test_a_method_that_saves_nothing_is_named(tmp_path, capfd, checkpoint, words, warned):
    ats = ["--checkpoint", checkpoint, "--method", "ats", "--blocks", "1", *words]
    assert main([PICTURES[0], *ats, "-o", str(tmp_path / "out.png")]) == 0
    told = "ats saves nothing without --max-tokens: every block has room for all "
    assert (told in capfd.readouterr().err) is warned


def test_compares_all_methods(tmp_path, small_config):
    out, short = tmp_path / "all.svg", dataclasses.replace(small_config, depth=2)
    checkpoint = make_checkpoint(tmp_path / "checkpoint", short)
    config = VisualizeConfig(
        images=(PICTURES[0],), output=out, checkpoint=checkpoint, compare=True, share=0.7
    )
    (row,) = visualize(config)
    titles = [panel.title.split("\n")[0] for panel in row]
    assert titles == ["picture", *(name for name in hvit_jax.REDUCERS if name != "dense")]
    drawing = out.read_text()
    assert len(drawing) > 10_000
    # Rows of so many panels go on below.
    width = re.search(r'width="([\d.]+)pt"', drawing)
    assert width and float(width[1]) < (MOST_PANELS + 1) * 72 * INCHES


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.png"], "nowhere.png"),
        ([PICTURES[0], "--after", "1,6"], "--after 1,6: the model's blocks are 0 to 5"),
        ([PICTURES[0], "--compare", "--after", "1,2"], "one block"),
        (
            [PICTURES[0], "--compare", "--method", "tome"],
            "draws all methods at --share; leave --method out",
        ),
        ([PICTURES[0], "--compare", "--method-args=a.json"], "cannot read a.json"),
        ([PICTURES[0], "--compare", "--num-clusters", "9"], "leave --num-clusters out"),
        ([PICTURES[0], "--compare", "--r", "4"], "the default method has no option --r"),
        (
            [PICTURES[0], "--compare", "--share", "2"],
            "--share must be above 0 and at most 1, got 2",
        ),
        ([PICTURES[0], "--method", "tome", "--share", "0.5"], "--share is for --compare"),
        ([PICTURES[0], "--method", "tome", "--keep-rate", "0.5"], "--keep-rate"),
        ([PICTURES[0], "-r", "57"], "57 is not a multiple of the patch size 4"),
        ([PICTURES[0], "--checkpoint", "nowhere"], "nowhere"),
        ([str(demo.FOLDER / "images.LICENSE")], "not a picture"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capfd, arguments, message):
    out = tmp_path / "out.png"
    assert main([*arguments, "-o", str(out)]) == 2
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and message in lines[0]
    assert not out.exists()


def test_refuses_formats_it_cannot_write(tmp_path, capfd):
    assert main([PICTURES[0], "-o", str(tmp_path / "out.xyz")]) == 2
    assert (
        "--output takes a name that ends in .png, .jpg, .jpeg, .svg, .pdf" in capfd.readouterr().err
    )


@pytest.mark.parametrize("method", sorted(hvit_jax.REDUCERS))
def test_options_of_every_method_fit_beside_its_own(tmp_path, capfd, method):
    """The command's own flags must not be those of a method; the format is refused later."""
    arguments = [PICTURES[0], "--method", method, "--after", "1", "-o", str(tmp_path / "out.xyz")]
    assert main(arguments) == 2
    assert "--output takes" in capfd.readouterr().err
