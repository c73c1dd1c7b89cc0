"""Reads an auxiliary model's folder in the transformers layout: `config.json` and its weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from handler.errors import CheckpointError
from handler.file_kind import Kind, file_kind, wrong_kind
from handler.torch_file import read_torch_file

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The names of weights, the first there is being read."""


def read_model_config(folder: Path) -> dict[str, Any]:
    """The keys of `config.json`.

    Raises:
        CheckpointError: if it is absent or not a JSON object.
    """
    path = folder / "config.json"
    try:
        require_json(path)
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; fetch the whole model repository") from None
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); fetch it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: not a JSON object; fetch it again")
    return config


def read_model_weights(folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """The file of weights and its tensors by name; only tensors and plain types are unpickled.

    Raises:
        CheckpointError: if there is no such file, or it is of another kind (says which), damaged, or holds anything but
            tensors.
    """
    path = weights_file(folder)
    if path is None:
        raise CheckpointError(f"{folder}: no {' or '.join(WEIGHTS)}; fetch the whole model repository")
    if path.suffix == ".safetensors":
        require_safetensors(path)
        try:
            return path, load_file(path)
        except (SafetensorError, RuntimeError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read ({error}); fetch it again") from error
    state, _ = read_torch_file(path, what="weights in torch's format")
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: not a state dict of tensors; fetch the model's own weights")
    return path, dict(state)


def weights_file(folder: Path) -> Path | None:
    """The file of weights that is read in a folder, None if there is none."""
    return next((path for name in WEIGHTS if (path := folder / name).is_file()), None)


def require_safetensors(path: Path) -> None:
    """Raises CheckpointError for a file that is there and of another kind; says what it is and what to do."""
    if path.is_file() and (found := file_kind(path)).kind is not Kind.SAFETENSORS:
        raise CheckpointError(wrong_kind(path, "a safetensors file", found))


def require_kind(path: Path) -> None:
    """Raises CheckpointError for a file of a model that begins as no file of its name does; says what it is."""
    if path.suffix == ".json":
        require_json(path)
    elif (found := file_kind(path)).kind in (Kind.TEXT, Kind.EMPTY):
        raise CheckpointError(wrong_kind(path, f"a model's {path.name}", found))


def require_json(path: Path) -> None:
    """Raises CheckpointError for a file that is there and does not begin as a JSON object does."""
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(16).removeprefix(b"\xef\xbb\xbf").lstrip()
    if not head.startswith((b"{", b"[")):
        raise CheckpointError(wrong_kind(path, "JSON"))
