"""Training a decoder on pictures whose pixels are labelled."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image

import hvit_jax
from hvit_jax import InputError, dense
from hvit_jax.checkpoint import read_description
from hvit_jax.commands.flags import parse
from hvit_jax.commands.train import main
from hvit_jax.config import Decoder
from hvit_jax.dense.folders import open_scenes
from hvit_jax.dense.metrics import Segmentation
from hvit_jax.dense.windows import Layout
from hvit_jax.distributed.placement import place
from hvit_jax.models.parameters import build_model, init_parameters
from hvit_jax.pictures import Windows
from hvit_jax.training import TrainConfig
from hvit_jax.training.data import AugmentedMaps
from hvit_jax.training.start import begin, open_data
from hvit_jax.training.trainer import Trainer, map_loss
from tests.dense.test_windows import CONFIG
from tests.training_setup import SIZES, column, parameters, rows

TASK = "--task segmentation --epochs 12 -b 8 --learning-rate 0.01 --log-every 2 --seed 3".split()
TEACH = "--distill --method evit".split()


def make_scenes(root, seed=0):
    """Dark pictures with a light square, which is class 1; its rim does not count."""
    random = np.random.default_rng(seed)
    for split, count in (("train", 12), ("val", 3)):
        for kind in ("images", "labels"):
            (root / kind / split).mkdir(parents=True)
        for number in range(count):
            pixels = random.integers(0, 100, (24, 30, 3))
            labels = np.zeros((24, 30), np.uint8)
            top, left = random.integers(0, 12), random.integers(0, 18)
            labels[top : top + 12, left : left + 12] = 255
            labels[top + 1 : top + 11, left + 1 : left + 11] = 1
            pixels[labels == 1] += 150
            name = f"{split}/{number}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / name)
            Image.fromarray(labels).save(root / "labels" / name)
    (root / "classes.txt").write_text("ground\nsquare\n")
    return root


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_scenes(tmp_path_factory.mktemp("scenes"))


def miou(model, data):
    scenes, metric = open_scenes(data), Segmentation(("ground", "square"))
    total = 0
    for index in range(len(scenes)):
        found = dense.predict(model, scenes.open(index))
        total = total + metric.measure(found, scenes.truth(index, found.shape, 2))
    return metric.scores(total, len(scenes))["miou"]


def test_it_learns_resumes_and_is_used(data, tmp_path, capsys):
    output, words = tmp_path / "run", [str(data), *SIZES, *TASK, "--scale-range", "0.8,1.5"]
    assert main([*words, "--output", str(output)]) == 0
    said = capsys.readouterr().out
    assert "12 pictures, 2 classes; validated on 3" in said
    losses = column(output, "loss")
    assert losses[-1] < 0.5 * losses[0]
    last = rows(output, "validation")[-1]
    assert list(last) == ["step", "epoch", "miou", "macc", "aacc"] and float(last["miou"]) > 60
    assert f"mIoU {float(last['miou']):.2f} %, mAcc " in said

    description = read_description(output / "checkpoint")
    assert description.classes == ("ground", "square")
    assert description.config.num_classes == 0 and description.config.decoder.kind == "linear"
    model = hvit_jax.load(output / "checkpoint")
    assert miou(model, data) == pytest.approx(float(last["miou"]), abs=0.01)
    assert main([*words, "--output", str(output), "--resume"]) == 0
    assert f"{output} is finished" in capsys.readouterr().out

    mask = tmp_path / "mask"
    start = [str(data), "--output", str(mask), "--checkpoint", str(output / "checkpoint")]
    frozen = "--decoder mask --train head --epochs 1 -b 8 --method hourglass -l 1".split()
    assert main([*start, "--task", "segmentation", *frozen]) == 0
    assert "a new mask decoder for 2 classes\n" in capsys.readouterr().out
    before, after = parameters(output), parameters(mask)
    before.pop("decoder"), after.pop("decoder")
    jax.tree.map(np.testing.assert_array_equal, before, after)
    assert read_description(mask / "checkpoint").source["method"] == "hourglass"
    assert len(rows(mask, "validation")) == 1

    again = [str(data), "-o", "x", "--checkpoint", str(output / "checkpoint"), *TASK]
    _, kept, note = begin(parse(TrainConfig, again, "x"), ("ground", "square"))
    assert note is None
    jax.tree.map(np.testing.assert_array_equal, kept, parameters(output))
    begun, new, _ = begin(
        parse(TrainConfig, [*again, "--decoder", "mask"], "x"), description.classes
    )
    drawn = init_parameters(begun.config, 3)["decoder"]
    jax.tree.map(np.testing.assert_array_equal, new["decoder"], drawn)
    classes = ("ground", "square")
    words = [str(data), "-o", "x", "--checkpoint", str(output / "checkpoint"), "-r", "32"]
    whole, head, note = begin(parse(TrainConfig, words, "x"), classes)
    assert whole.config.decoder is None and whole.config.num_classes == 2
    assert "decoder" not in head and head["head"]["kernel"].shape == (16, 2)
    assert note == "a new head for 2 classes; the checkpoint has none"
    for names, options, words in (
        (("ground", "house"), [], "the data's class names are not the checkpoint's"),
        (("a", "b", "c"), ["--order"], "the checkpoint has no linear decoder of 3 classes"),
        (classes, ["--decoder", "mask", *TEACH], "the checkpoint has no mask decoder for the"),
    ):
        with pytest.raises(InputError, match=words):
            begin(parse(TrainConfig, [*again, *options], "x"), names)


def test_pictures_are_turned_where_that_is_asked_for(data):
    words = [str(data), "-o", "x", *SIZES, *TASK]
    opened = open_data(parse(TrainConfig, [*words, "--exif"], "x"))
    assert opened.pictures.exif and opened.held_out.exif
    assert not open_data(parse(TrainConfig, words, "x")).pictures.exif


def test_loss_is_that_of_the_pixels_that_count():
    logits = jnp.log(jnp.array([[[[0.5, 0.5], [0.25, 0.75]]], [[[0.5, 0.5], [0.9, 0.1]]]]))
    labels = jnp.array([[[0, 255]], [[1, 0]]])
    loss, right = map_loss(logits, labels)
    expected = (-np.log(0.5) + (-np.log(0.5) - np.log(0.9)) / 2) / 2
    assert float(loss) == pytest.approx(expected, rel=1e-6)
    assert float(right) == pytest.approx((1 + 0.5) / 2)
    none, _ = map_loss(logits, jnp.full_like(labels, 255))
    assert float(none) == 0
    smooth, _ = map_loss(logits[:1], labels[:1], 0.2)
    assert float(smooth) == pytest.approx(-np.log(0.5), rel=1e-6)
    parts = [float(map_loss(logits[row : row + 1], labels[row : row + 1])[0]) for row in (0, 1)]
    assert float(loss) == pytest.approx(np.mean(parts))


def test_a_teacher_is_heard_on_the_pixels_that_count():
    decoder = Decoder("linear", 2)
    sizes = replace(CONFIG, num_classes=0, decoder=decoder)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (2, *sizes.image_shape, 3), np.uint8)
    labels = random.integers(0, 2, pixels.shape[:3])
    labels[0, :20] = labels[1, :, 5:] = 255
    reducer = hvit_jax.make_reducer("evit", keep_rate=0.3, drop_locations=(0,)).resolve(sizes)
    one, weights = place(jax.devices()[:1]), init_parameters(sizes, 0)
    trainer = Trainer(sizes, reducer, optax.sgd(0.1), one, distill=1.0)
    _, metrics = jax.jit(trainer.gradients)(weights, {}, pixels, labels, weights)
    images = trainer.normalize(jnp.asarray(pixels))
    said = (
        hvit_jax.jit_model(build_model(sizes, each, weights))(images)
        for each in (hvit_jax.Reducer(), reducer)
    )
    teacher, model = (np.asarray(jax.nn.log_softmax(each), np.float64) for each in said)
    divergence = (np.exp(teacher) * (teacher - model)).sum(-1)
    known = labels < 2
    expected = np.mean([divergence[row][known[row]].mean() for row in (0, 1)])
    assert float(metrics["loss"]) == pytest.approx(expected, rel=1e-4) and expected > 1e-3


def test_picture_and_truth_are_cut_alike(tmp_path):
    """Red tells the label: so it does in every window, and what is beyond does not count."""
    for kind in ("images", "labels"):
        (tmp_path / kind).mkdir()
    labels = np.repeat(np.repeat(np.arange(12, dtype=np.uint8).reshape(3, 4), 10, 0), 10, 1)
    pixels = np.stack([20 * labels, 0 * labels, 0 * labels], axis=-1)
    Image.fromarray(labels).save(tmp_path / "labels" / "0.png")
    Image.fromarray(pixels).save(tmp_path / "images" / "0.png")
    layout = Layout.of(CONFIG, Windows())
    scenes = open_scenes(tmp_path)
    maps = AugmentedMaps(scenes, 12, layout, (0.5, 0.5, 0.5), (0.5, 2.0), flip=True)
    sizes = set()
    for seed in range(20):
        item = maps(0, np.random.default_rng(seed))
        pixels, labels = item["pixels"], item["label"]
        assert pixels.shape == (32, 32, 3) and labels.shape == (32, 32)
        known = labels != 255
        assert (pixels[~known] == 128).all()
        near = np.abs(pixels[known][:, 0] / 20.0 - labels[known]) < 0.5
        assert near.mean() > 0.8  # The others are where two labels meet.
        sizes.add(int(known.sum()))
    assert len(sizes) > 5 and max(sizes) == 32 * 32


def test_pictures_are_scaled_as_when_the_model_is_used(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (80, 100, 3), np.uint8)
    for kind, pixels in (("images", noise), ("labels", noise[..., 0] % 5)):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / "0.png")
    layout, mean = Layout.of(CONFIG, Windows(window=(32, 40), short_side=32)), (0.5, 0.5, 0.5)
    item = AugmentedMaps(open_scenes(tmp_path), 5, layout, mean)(0, np.random.default_rng(0))
    used = layout.views(noise, mean)[0].pixels
    np.testing.assert_allclose(item["pixels"].astype(int), used, atol=1)
    nearest = np.ix_(
        ((np.arange(32) + 0.5) * 2.5).astype(int), ((np.arange(40) + 0.5) * 2.5).astype(int)
    )
    np.testing.assert_array_equal(item["label"], noise[..., 0][nearest] % 5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixup", "0.2", *TASK], "--mixup has no effect with --task segmentation"),
        (["--decoder", "mask"], "--decoder has no effect with --task classification"),
        (["--short-side", "20"], "--short-side has no effect with --task classification"),
        ([*TASK, "--scale-range", "2,1"], "--scale-range takes the least first, got 2,1"),
        ([*TASK, "--truth", "none"], "training needs the truth of its pictures"),
        ([*TASK, "--dataset", "ade20k"], "holds no ade20k"),
    ],
)
def test_bad_input(data, tmp_path, capsys, words, message):
    assert main([str(data), "--output", str(tmp_path / "run"), *SIZES, *words]) == 2
    assert message in capsys.readouterr().err
