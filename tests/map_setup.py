"""Tiny models that make maps, and folders of pictures with truth, laid out as known data sets."""

import json

import numpy as np
from PIL import Image

import hvit_jax
from hvit_jax.checkpoint import Description, save_checkpoint
from hvit_jax.commands import depth, segment
from hvit_jax.commands.flags import parse
from hvit_jax.config import Decoder
from hvit_jax.dense.config import DepthConfig, SegmentConfig
from hvit_jax.dense.run import Seams, map_pictures
from hvit_jax.models.parameters import init_parameters
from hvit_jax.pictures import Preprocessing, Windows
from hvit_jax.system.run import run

HALF = Preprocessing(mean=(0.5,) * 3, std=(0.5,) * 3)
WINDOWS = Windows(stride=24)
SIZES = [(32, 32), (40, 56), (24, 48), (33, 70), (64, 40)]


def config_of(decoder):
    return hvit_jax.ViTConfig(
        (32, 32), 8, depth=2, width=16, heads=2, mlp_width=32, num_classes=0, decoder=decoder
    )


def make_checkpoint(folder, outputs=5, *, decoder=None, classes=(), windows=WINDOWS):
    config = config_of(decoder or Decoder("linear", outputs))
    parameters = init_parameters(config, 3)
    # Random tokens are all alike: patches that differ get labels that differ.
    parameters["patch_embed"]["kernel"] = 3 * parameters["patch_embed"]["kernel"]
    save_checkpoint(folder, parameters, Description(config, {}, classes, HALF, windows))
    return folder


def noise(size, seed):
    """A picture of blocks of eight pixels."""
    rows, columns = (-(-side // 8) for side in size)
    blocks = np.random.default_rng(seed).integers(0, 256, (rows, columns, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((8, 8, 1), np.uint8))[: size[0], : size[1]]


def truth_of(size, seed, values):
    """Labels in blocks of eight pixels, drawn from values."""
    rows, columns = (-(-side // 8) for side in size)
    chosen = np.random.default_rng(100 + seed).choice(values, (rows, columns))
    return np.kron(chosen, np.ones((8, 8), int))[: size[0], : size[1]].astype(np.uint8)


def save(path, pixels, palette=False):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(pixels)
    if palette:
        image.putpalette(bytes(range(256)) * 3)
    image.save(path)


def make_folder(root, values, sizes=SIZES):
    """Plain folders `images` and `labels`, with palettes."""
    for number, size in enumerate(sizes):
        save(root / "images" / f"{number}.png", noise(size, number))
        save(root / "labels" / f"{number}.png", truth_of(size, number, values), palette=True)
    return root


def segmented(folder, checkpoint, *arguments, program="segment", **seams):
    """Run the command line in this process; returns its exit status."""
    words = [str(word) for word in (folder, "--checkpoint", checkpoint, "-j", 0, *arguments)]
    main = {"segment": segment.main, "depth": depth.main}[program]
    if not seams:
        return main(words)
    record = {"segment": SegmentConfig, "depth": DepthConfig}[program]
    config = parse(record, words, f"hvit {program}")
    return run(lambda: not map_pictures(config, seams=Seams(**seams)), f"hvit {program}")


def results_of(folder, checkpoint, output, *arguments, **options):
    """Run it and read its results."""
    file = output / "r.json"
    status = segmented(folder, checkpoint, "-o", file, "--overwrite", *arguments, **options)
    assert status == 0
    return json.loads(file.read_text())
