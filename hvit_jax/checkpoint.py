"""Checkpoints on disk: an Orbax folder of weights and a small JSON description.

DIR/model.json   sizes, preprocessing, where the weights came from, format version
DIR/weights/     Orbax checkpoint of the tree in hvit_jax.models.parameters
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint import type_handlers

from hvit_jax.config import ViTConfig, as_pair
from hvit_jax.distributed.placement import Placement
from hvit_jax.errors import InputError
from hvit_jax.fields import from_json
from hvit_jax.models.parameters import Tree, abstract_parameters, count_parameters, flatten
from hvit_jax.models.reducer import Reducer
from hvit_jax.ops.resizing import resize_positions
from hvit_jax.pictures import Preprocessing, Windows
from hvit_jax.reducers import make_reducer, method_name
from hvit_jax.system.files import checksums, damages, new_folder, require_space
from hvit_jax.system.library_messages import why_failed, without_messages_of_orbax
from hvit_jax.system.signals import uninterrupted

FORMAT_VERSION = 1
DESCRIPTION, WEIGHTS = "model.json", "weights"
TRAINED = "hvit train"  # The format of a source that names its method under `method` and `args`.
_NAMED = 5  # broken parameters that a message names
_OVERHEAD = 1 << 18  # bytes that a checkpoint takes beside its numbers, generously
_CHUNK = 1 << 26  # bytes that a file of weights holds; two of these are in memory at once
_MAPPED = "mapped"  # where arrays are that wait to be written


@dataclass(frozen=True)
class Description:
    """What `model.json` says."""

    config: ViTConfig
    # Where the weights came from: file name, SHA-256, format, and the like.
    source: dict[str, Any] = dataclasses.field(default_factory=dict)
    classes: tuple[str, ...] = ()  # In the head's order; empty if they are not known.
    preprocessing: Preprocessing = Preprocessing()
    windows: Windows = Windows()  # Of models that make maps.

    def at(self, resolution: int | tuple[int, int] | None) -> Description:
        """Describe the model at another resolution, or as it is where that is None.

        Raises:
            InputError: if whole patches do not cover it.
        """
        if resolution is None or as_pair(resolution) == self.config.image_shape:
            return self
        return dataclasses.replace(
            self,
            config=dataclasses.replace(self.config, resolution=resolution),
            # What no patch covers belongs to the size that the model was trained at.
            preprocessing=dataclasses.replace(self.preprocessing, uncovered=(0, 0)),
        )


def save_checkpoint(
    directory: str | Path, parameters: Tree | Callable[[Path], Tree], description: Description
) -> None:
    """Write a checkpoint, from one process; the folder appears whole or not at all.

    Args:
        directory: the folder; must not exist.
        parameters: arrays, or what makes them. That is given an empty folder for files that arrays
            may be mapped from, so that a model larger than memory can be saved; it is removed.
        description: of the model.

    Raises:
        InputError: if the parameters are not those of the description's sizes, or the folder exists
            or cannot be written.
    """
    wanted = abstract_parameters(description.config)
    mapped = callable(parameters)
    if not mapped:
        _compare("the parameters", flatten(parameters), description.config)
    with new_folder(directory) as temporary:
        size = 4 * count_parameters(wanted)
        require_space(directory, temporary, _OVERHEAD + size * (1 + mapped))
        if mapped:
            (temporary / _MAPPED).mkdir()
            parameters = parameters(temporary / _MAPPED)
            _compare("the parameters", flatten(parameters), description.config)
        try:
            with uninterrupted(), without_messages_of_orbax(), _checkpointer() as checkpointer:
                chunks = ocp.SaveArgs(chunk_byte_size=_CHUNK)
                arguments = ocp.args.PyTreeSave(
                    jax.tree.map(np.asarray, parameters),
                    save_args=jax.tree.map(lambda _: chunks, parameters),
                )
                checkpointer.save(temporary / WEIGHTS, arguments)
        except Exception as error:  # Orbax and TensorStore have no common base class.
            raise InputError(f"cannot write {directory}: {why_failed(error)}") from error
        shutil.rmtree(temporary / _MAPPED, ignore_errors=True)
        about = {
            "format_version": FORMAT_VERSION,
            **dataclasses.asdict(description),
            "weights": checksums(temporary / WEIGHTS),
        }
        (temporary / DESCRIPTION).write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")


def _checkpointer() -> ocp.Checkpointer:
    """Make what writes NumPy arrays in chunks, without copying them first, from this process."""
    alone = ocp.options.MultiprocessingOptions(
        primary_host=jax.process_index(), active_processes={jax.process_index()}
    )
    arrays = type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = type_handlers.create_type_handler_registry((np.ndarray, arrays))
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=False, type_handler_registry=registry, multiprocessing_options=alone
    )
    return ocp.Checkpointer(handler, multiprocessing_options=alone)


def read_description(directory: str | Path) -> Description:
    """Read and check `model.json`.

    Raises:
        InputError: if the folder is missing, no checkpoint, or of another format version.
    """
    return _read(directory)[0]


def _read(directory: str | Path) -> tuple[Description, dict[str, dict[str, int]]]:
    """Read `model.json`: the description, and the checksums of the weights."""
    path = Path(directory) / DESCRIPTION
    if not Path(directory).exists():
        raise InputError(f"checkpoint {directory} does not exist")
    if not path.is_file():
        hint = f"make one with: hvit convert SOURCE.torch {directory}.jax"
        if (trained := Path(directory, "checkpoint")).is_dir():  # As hvit train makes it.
            hint = f"{trained} may be one"
        raise InputError(f"{directory} is not a checkpoint: it has no {DESCRIPTION}; {hint}")
    try:
        text = json.loads(path.read_text(encoding="utf-8"))
        version = text["format_version"]
        if version != FORMAT_VERSION:
            raise InputError(f"format version {version!r}, this release reads {FORMAT_VERSION}")
        return parse_description(text), {
            name: {"bytes": int(sums["bytes"]), "crc32": int(sums["crc32"])}
            for name, sums in text["weights"].items()
        }
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {type(error).__name__}: {error}") from error


def parse_description(content: dict[str, Any]) -> Description:
    """Read a description from the JSON object that `dataclasses.asdict` made of it.

    Raises:
        InputError, ValueError, KeyError, TypeError, AttributeError: if it is none.
    """
    sizes, classes = dict(content["config"]), tuple(content["classes"])
    config = from_json(ViTConfig, {**sizes, "resolution": as_pair(sizes["resolution"])})
    outputs = config.num_classes if config.decoder is None else config.decoder.outputs
    if classes and len(set(classes)) != outputs:
        raise InputError(f"{len(set(classes))} different classes for {outputs} outputs")
    return Description(
        config,
        dict(content["source"]),
        classes,
        from_json(Preprocessing, content.get("preprocessing", {})),
        from_json(Windows, content.get("windows", {})),
    )


def origin_of(description: Description) -> dict[str, Any]:
    """Find the source that a checkpoint's weights were first converted from, if they were."""
    source = description.source
    while source.get("format") == TRAINED:
        source = source.get("begun", {})
    return source


def trained_with(description: Description) -> str | None:
    """Name the method that `hvit train` trained a checkpoint with; None: dense, or converted."""
    source = description.source
    method = source["method"] if source.get("format") == TRAINED else Reducer.name
    return None if method == Reducer.name else method


def choose_method(
    given: Reducer | None,
    description: Description,
    say: Callable[[str], object],
    otherwise: Reducer = Reducer(),
) -> Reducer:
    """Choose the method that a checkpoint runs under.

    Args:
        given: the user's choice, which always counts; None: the one that the checkpoint was trained
            with.
        description: the checkpoint's.
        say: is told of a method that the user did not name.
        otherwise: what a checkpoint runs under that was converted, or trained dense.

    Raises:
        InputError: if this release does not know the method that the checkpoint was trained with.
    """
    if given is not None:
        return given
    method = trained_with(description)
    if method is None:
        return otherwise
    try:
        trained = make_reducer(method, **description.source["args"])
    except InputError as error:
        raise InputError(f"the checkpoint was trained with: {error}; choose a --method") from error
    name = method_name(trained.name, trained.options())
    say(f"trained with {name}, which is used; --method dense runs the dense model")
    return trained


def load_parameters(
    directory: str | Path, config: ViTConfig, placement: Placement | None = None
) -> Tree:
    """Read a checkpoint's weights in float32.

    Args:
        directory: the checkpoint.
        config: its sizes.
        placement: devices that each read their own parts of the blocks' weights, and all of the
            others; no host or device ever has all of them. None: NumPy arrays.

    Raises:
        InputError: if the weights are missing, damaged, or are not those of `config`; all missing,
            surplus and misshapen arrays are listed, and those that hold NaN or infinite numbers.
    """
    weights = Path(directory).absolute() / WEIGHTS
    if not weights.is_dir():
        raise InputError(f"{directory} is not a whole checkpoint: it has no folder {WEIGHTS}")
    # TensorStore itself notices only some damage, and reports that in pages of tracebacks.
    damaged = damages(weights, _read(directory)[1])
    if damaged:
        raise InputError(f"checkpoint {directory} is damaged: in {WEIGHTS}, {'; '.join(damaged)}")
    wanted = abstract_parameters(config)
    try:
        with uninterrupted(), ocp.PyTreeCheckpointer() as checkpointer:
            found = checkpointer.metadata(weights).item_metadata
            if found is None:
                raise InputError(f"{directory} is not a checkpoint: {WEIGHTS} holds no Orbax tree")
            _compare(f"checkpoint {directory}", flatten(found.tree), config)
            arguments = _restore_arguments(wanted, placement)
            parameters = checkpointer.restore(weights, item=wanted, restore_args=arguments)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"checkpoint {directory} is damaged: {why_failed(error)}") from error
    broken = [_where(name, leaf) for name, leaf in flatten(parameters).items() if _broken(leaf)]
    if broken:
        more = f" and {len(broken) - _NAMED} more" if len(broken) > _NAMED else ""
        names = ", ".join(broken[:_NAMED]) + more
        raise InputError(f"checkpoint {directory}: NaN or infinite numbers in {names}")
    return parameters


def _restore_arguments(wanted: Tree, placement: Placement | None) -> Tree:
    """Say for each array what to restore it as."""
    wide = np.dtype(np.float32)
    if placement is None:
        return jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=wide), wanted)

    def restored(path: Any, leaf: jax.ShapeDtypeStruct) -> ocp.ArrayRestoreArgs:
        block = path[0].key == "blocks"
        where = placement.sharding(leaf.shape) if block else placement.replicated
        return ocp.ArrayRestoreArgs(restore_type=jax.Array, dtype=wide, sharding=where)

    return jax.tree_util.tree_map_with_path(restored, wanted)


def _broken(array: np.ndarray | jax.Array) -> bool:
    # Unlike `isfinite(array)`, these two need no memory; both are NaN where any number is.
    return not np.isfinite([array.min(), array.max()]).all()


def _where(name: str, array: np.ndarray | jax.Array) -> str:
    """Name a parameter; of the blocks' stacked ones, the first block that is broken."""
    if not name.startswith(("blocks/", "decoder/blocks/")):
        return name
    return f"{name} of block {next(index for index, each in enumerate(array) if _broken(each))}"


def _compare(what: str, found: dict[str, Any], config: ViTConfig) -> None:
    """Raise one error that lists every difference between arrays and those of a configuration."""
    wanted = flatten(abstract_parameters(config))
    misshapen = [
        f"{name} is {tuple(found[name].shape)}, not {wanted[name].shape}"
        for name in wanted
        if name in found and tuple(found[name].shape) != wanted[name].shape
    ]
    problems = {
        "missing": sorted(wanted.keys() - found.keys()),
        "left over": sorted(found.keys() - wanted.keys()),
        "wrong shape": misshapen,
    }
    text = [f"{kind}: {', '.join(names)}" for kind, names in problems.items() if names]
    if text:
        raise InputError(f"{what}: not the arrays of the model in {DESCRIPTION}; {'; '.join(text)}")


def resize_parameters(parameters: Tree, config: ViTConfig, new: ViTConfig) -> Tree:
    """Fit parameters of one resolution to another by resizing the position embeddings."""
    if not config.position_embedding:
        return parameters
    positions = resize_positions(
        np.asarray(parameters["pos_embedding"], np.float32),
        config.grid,
        new.grid,
        rule=config.position_resizing,
        prefix=config.position_prefix,
    )
    return {**parameters, "pos_embedding": positions}


def fitted_parameters(
    directory: str | Path, config: ViTConfig, placement: Placement | None = None
) -> Tree:
    """Read a checkpoint's weights for its sizes at the same or another resolution.

    Arguments are as for `load_parameters`.

    Raises:
        InputError: as `load_parameters`.
    """
    stored = read_description(directory).config
    parameters = load_parameters(directory, stored, placement)
    resized = resize_parameters(parameters, stored, config)
    if placement is not None and config.position_embedding:
        resized["pos_embedding"] = placement.replicate(resized["pos_embedding"])
    return resized


def describe_checkpoint(checkpoint: str | Path | None) -> dict[str, Any]:
    """Name a checkpoint by its origin and content; None for weights that are drawn."""
    if checkpoint is None:
        return {"checkpoint_source": None, "checkpoint_sha256": None}
    return {
        "checkpoint_source": read_description(checkpoint).source,
        "checkpoint_sha256": checkpoint_sha256(checkpoint),
    }


def checkpoint_sha256(checkpoint: str | Path) -> str:
    """Name a checkpoint by its description, which holds checksums of the weights."""
    return hashlib.sha256((Path(checkpoint) / DESCRIPTION).read_bytes()).hexdigest()
