"""Files that hold a method's options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from hvit_jax.errors import InputError
from hvit_jax.reducers import make_reducer


def read_method_args(path: str | Path, method: str) -> dict[str, Any]:
    """Read a method's options from a file: calibrate's, or the results of an evaluation.

    Args:
        path: the JSON file.
        method: the method that they are wanted for.

    Returns:
        Options for `make_reducer(method, ...)`.

    Raises:
        InputError: if the file cannot be read, is of another method, or its options are wrong.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict) or not isinstance(content.get("args"), dict):
        raise InputError(
            f"{path} holds no method's options, as python -m hvit_jax.calibrate and "
            "hvit-eval --output write them"
        )
    if content.get("method") != method:
        raise InputError(f"{path} is for the method {content.get('method')!r}, not {method!r}")
    try:
        make_reducer(method, **content["args"])
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    return content["args"]
