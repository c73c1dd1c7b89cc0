"""Reads an auxiliary model's folder in the transformers layout: `config.json` and its weights."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from handler.errors import CheckpointError

WEIGHTS = ("model.safetensors", "pytorch_model.bin")
"""The names of weights, the first there is being read."""


def read_model_config(folder: Path) -> dict[str, Any]:
    """The keys of `config.json`.

    Raises:
        CheckpointError: if it is absent or not a JSON object.
    """
    path = folder / "config.json"
    try:
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
        CheckpointError: if there is no such file, or it is damaged or holds anything but tensors.
    """
    path = next((path for name in WEIGHTS if (path := folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder}: no {' or '.join(WEIGHTS)}; fetch the whole model repository")
    try:
        if path.suffix == ".safetensors":
            return path, load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: can't be read ({error}); fetch it again") from error
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{path}: not a state dict of tensors; fetch the model's own weights")
    return path, dict(state)
