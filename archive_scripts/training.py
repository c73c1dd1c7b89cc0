"""Reads audiocraft's training checkpoints, trusting nothing in them."""

from __future__ import annotations

import collections
import pickle
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.nodes import AnyNode, BooleanNode, FloatNode, IntegerNode, StringNode
from torch import Tensor

from handler.checkpoint import Config
from handler.errors import CheckpointError

TRAINING_FILE = "checkpoint.th"

# All that a pickle may name besides tensors and plain values: what a configuration of OmegaConf is made of.
ALLOWED: list[Any] = [
    *(DictConfig, ListConfig, ContainerMetadata, Metadata),
    *(AnyNode, BooleanNode, FloatNode, IntegerNode, StringNode),
    *(dict, list, int, float, str, bool, collections.defaultdict),
    (typing.Any, "typing.Any"),
]


@dataclass(frozen=True, slots=True)
class Training:
    """The best state of a training run.

    Attributes:
        source: the file, for messages.
        config: its `xp.cfg`.
        text: the same as YAML, interpolations unresolved.
        state: parameters by name, as they are stored and still in the file.
    """

    source: str
    config: Config
    text: str
    state: dict[str, Tensor]


def read_training(path: Path) -> Training:
    """The best state of a training checkpoint.

    Args:
        path: a folder with `checkpoint.th`, or a file of that kind (`checkpoint_<epoch>.th`).

    Raises:
        CheckpointError: it is absent, cut short, an export already, holds a foreign class, or has no best state.
    """
    path = path / TRAINING_FILE if path.is_dir() else path
    package = _load(path)
    if not isinstance(package, dict) or "xp.cfg" not in package:
        raise CheckpointError(f"{path} is no training checkpoint of audiocraft: it has no xp.cfg.")
    if package.get("exported"):
        raise CheckpointError(f"{path} is exported already; use it as it is.")
    config = package["xp.cfg"]
    if not isinstance(config, DictConfig):
        raise CheckpointError(f"{path}: its xp.cfg is a {type(config).__name__}, not a configuration of OmegaConf.")
    text = OmegaConf.to_yaml(config)
    return Training(str(path), Config.parse(text, str(path)), text, _best_state(package, path))


def _best_state(package: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """With FSDP `best_state` holds one process's shards, and `fsdp_best_state` the whole model."""
    for key in ("fsdp_best_state", "best_state"):
        best = package.get(key)
        if isinstance(best, dict) and best:
            state = best.get("model")
            break
    else:
        raise CheckpointError(f"{path} has no best_state. Train it for an epoch with validation, or keep that state.")
    if not isinstance(state, dict) or not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: {key}['model'] is not a model's parameters by name.")
    wrapped = [name for name in state if "_fsdp_wrapped_module" in name]
    if wrapped:
        raise CheckpointError(
            f"{path}: {key} holds one process's part of a model trained with FSDP ({wrapped[0]}), and there is no "
            "fsdp_best_state. Take the file of the first process, without a number at its end."
        )
    return {str(name): value.detach() for name, value in state.items()}


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. audiocraft trains into a folder with {TRAINING_FILE}.")
    try:
        with torch.serialization.safe_globals(ALLOWED):
            # Mapped, so that what is not exported (the optimizer's state is the larger part) is never read.
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL `?([\w.]+)`?", str(error))
        name = foreign.group(1) if foreign else "an unknown class"
        raise CheckpointError(
            f"{path} holds {name}; a training checkpoint may hold only tensors, plain values and a configuration of "
            "OmegaConf. Loading it could run code of whoever made it, so it is refused."
        ) from error
    except (AttributeError, EOFError, LookupError, OSError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(
            f"{path} cannot be read: it is cut short or damaged ({reason}). Copy it again."
        ) from error
