"""Reads checkpoints that are not exports: audiocraft's training checkpoints, fine-tuners' files, bare parameters.

Nothing in them is trusted.
"""

from __future__ import annotations

import collections
import os
import tarfile
import tempfile
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import safetensors
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.base import ContainerMetadata, Metadata
from omegaconf.errors import OmegaConfBaseException
from omegaconf.nodes import AnyNode, BooleanNode, BytesNode, FloatNode, IntegerNode, StringNode
from safetensors.torch import load_file
from torch import Tensor

from archive_scripts.files import copy_stream, progress, require_space
from handler.checkpoint import (
    COMPRESSION_FILE,
    LM_FILE,
    STATE_KEYS,
    Config,
    export_command,
    transformers_refusal,
    wrapper_of,
)
from handler.errors import CheckpointError
from handler.file_kind import Kind, file_kind, wrong_kind
from handler.registry import TRAINING_FILE
from handler.torch_file import read_torch_file

# All that a pickle may name besides tensors and plain values: what a configuration of OmegaConf is made of.
ALLOWED: list[Any] = [
    *(DictConfig, ListConfig, ContainerMetadata, Metadata),
    *(AnyNode, BooleanNode, BytesNode, FloatNode, IntegerNode, StringNode),
    *(dict, list, int, float, str, bool, collections.defaultdict),
    (typing.Any, "typing.Any"),
]

_INNER_WRAPPERS = ("_orig_mod.", "_checkpoint_wrapped_module.")  # they may stand anywhere in a name
_MOST_LAYERS = 3  # of packing: a torch file in a tar in a gzip


@dataclass(frozen=True, slots=True)
class Training:
    """A model that was trained.

    Attributes:
        source: the file, for messages.
        config: its `xp.cfg`.
        text: the same as YAML, interpolations unresolved.
        state: parameters by name, as they are stored and still in the file where its format allows that.
    """

    source: str
    config: Config
    text: str
    state: dict[str, Tensor]


def training_file(path: Path, exported: str = LM_FILE) -> Path:
    """The file to read for a path: the path itself, or in a folder the training checkpoint or the export.

    Raises:
        CheckpointError: there is none; the message names what the folder holds.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise CheckpointError(f"{path} does not exist. Give a training folder, or the file of a checkpoint.")
    for name in (TRAINING_FILE, exported):
        if (path / name).is_file():
            return path / name
    held = ", ".join(sorted(entry.name for entry in path.iterdir())[:6]) or "nothing"
    raise CheckpointError(
        f"{path / TRAINING_FILE} does not exist, nor does {exported}: the folder holds {held}. Give the path of the "
        "file that holds the model."
    )


def read_training(path: Path, base: Training | None = None) -> Training:
    """The best state of a file, or the last one where there is no best, with its configuration.

    It may be a training checkpoint of audiocraft, a fine-tuner's `{'xp.cfg', 'model'}`, an export, or the parameters
    alone (a state_dict, in torch's or safetensors' format); and any of them in a tar archive or compressed.

    Args:
        path: the file, or its folder.
        base: gives the configuration of parameters that come without.

    Raises:
        CheckpointError: it is absent, cut short, holds a foreign class, or has no parameters or no configuration.
    """
    path = training_file(path)
    with _unpacked(path, path) as file:
        package = _read(file, path)
    if not isinstance(package, dict):
        raise CheckpointError(f"{path} holds a {type(package).__name__}, not a model's parameters by name.")
    if "pretrained" in package and "best_state" not in package:
        raise CheckpointError(
            f"{path} is a pointer to the codec {package['pretrained']!r}, not a language model. Give the language "
            "model's file, and this one with --compression."
        )
    state = _parameters(package, path)
    text = _config_text(package.get("xp.cfg"), path)
    if text is None:
        if base is None:
            command = export_command(path, base=True)
            raise CheckpointError(f"{path} is no training checkpoint of audiocraft: it has no xp.cfg. {command}")
        text = base.text
    return Training(str(path), Config.parse(text, str(path)), text, state)


def _read(file: Path, path: Path) -> Any:
    kind = file_kind(file)
    if kind.kind is Kind.SAFETENSORS:
        try:
            return load_file(file)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} cannot be read: it is cut short or damaged ({error}).") from error
    if not kind.holds_torch:
        raise CheckpointError(wrong_kind(path, "a training checkpoint", kind))
    # Mapped, so that what is not exported (the optimizer's state is the larger part) is never read.
    return read_torch_file(file, ALLOWED, "a training checkpoint")[0]


def _config_text(config: Any, path: Path) -> str | None:
    """An `xp.cfg` as YAML, interpolations unresolved; None: there is none."""
    if config is None or isinstance(config, str):
        return config
    if not isinstance(config, DictConfig | dict):
        raise CheckpointError(f"{path}: its xp.cfg is a {type(config).__name__}, not a configuration of OmegaConf.")
    try:
        return OmegaConf.to_yaml(config)
    except (OmegaConfBaseException, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: its xp.cfg is no whole configuration of OmegaConf ({error}).") from error


def _parameters(package: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """A model's parameters, under the names that the model itself has for them.

    With FSDP `best_state` holds one process's shards, and `fsdp_best_state` the whole model.
    """
    if package.get("best_state") == {} and not package.get("fsdp_best_state"):
        raise CheckpointError(f"{path} has no best_state. Train it for an epoch with validation, or keep that state.")
    key, state = _best_state(package)
    if not isinstance(state, dict) or not state:
        raise CheckpointError(f"{path} has no best_state, nor other parameters: {sorted(map(str, package))[:6]}.")
    if not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path}: {key} is not a model's parameters by name.")
    wrapped = [str(name) for name in state if "_fsdp_wrapped_module" in str(name)]
    if wrapped:
        raise CheckpointError(
            f"{path}: {key} holds one process's part of a model trained with FSDP ({wrapped[0]}), and there is no "
            "fsdp_best_state. Take the file of the first process, without a number at its end."
        )
    if refusal := transformers_refusal(path, state):
        raise CheckpointError(refusal)
    return _unwrapped({str(name): value.detach() for name, value in state.items()}, path)


def _best_state(package: Mapping[str, Any]) -> tuple[str, Any]:
    """The parameters and what to call them in messages."""
    for key in STATE_KEYS:
        best = package.get(key)
        if not isinstance(best, Mapping) or not best:
            continue
        if isinstance(best.get("model"), Mapping) or not all(isinstance(value, Tensor) for value in best.values()):
            return f"{key}['model']", best.get("model")
        return key, best
    tensors = {name: value for name, value in package.items() if isinstance(value, Tensor)}
    return "it", tensors if len(tensors) == len(package) else None


def _unwrapped(state: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """The parameters without what wrappers put before their names, however many there were.

    Of a class that holds a language model (`lm.`) and other models, the language model is taken.
    """
    while wrapper := wrapper_of(state):
        inside = {name: value for name, value in state.items() if name.startswith(wrapper)}
        if wrapper == "lm.":
            state = inside
        renamed = [(name.removeprefix(wrapper), value) for name, value in state.items()]
        state = dict(renamed)
        if len(state) < len(renamed):
            raise CheckpointError(f"{path} holds two parameters of one name, with {wrapper!r} before it and without.")
    for wrapper in _INNER_WRAPPERS:
        state = {name.replace(wrapper, ""): value for name, value in state.items()}
    return state


@contextmanager
def _unpacked(file: Path, path: Path, layers: int = 0) -> Iterator[Path]:
    """A file, taken out of the tar archives and compression around it into a temporary folder; `path` is for messages.

    On Linux tensors stay mapped after that is deleted.
    """
    kind = file_kind(file)
    if kind.kind not in (Kind.TAR, Kind.COMPRESSED) or layers == _MOST_LAYERS:
        yield file
        return
    with tempfile.TemporaryDirectory(prefix="musicgen-export-") as folder:
        target = Path(folder) / "checkpoint"
        try:
            _take_out(file, target, path)
        except (tarfile.TarError, EOFError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is {kind.what} that cannot be unpacked ({error}). {kind.advice}") from error
        with _unpacked(target, path, layers + 1) as inner:
            yield inner


def _take_out(file: Path, target: Path, path: Path) -> None:
    """Copies the one checkpoint out of a tar archive or a compressed file; no name in an archive becomes a path."""
    if not tarfile.is_tarfile(file):
        with _decompressed(file) as source, target.open("wb") as writer:
            require_space(target.parent, file.stat().st_size)
            with progress("unpacking", 0) as bar:
                copy_stream(source, writer, bar)
        return
    with tarfile.open(file, "r:*") as archive:
        members = [member for member in archive if member.isfile() and member.size]
        chosen = _checkpoints_of(members)
        if len(chosen) != 1:
            names = ", ".join(member.name for member in (chosen or members)[:6]) or "nothing"
            what = "several files that may be a checkpoint" if chosen else "no torch or safetensors file"
            raise CheckpointError(
                f"{path} is a tar archive of {what}: {names}. Unpack it (`tar -xf`), and export the file of the "
                "language model."
            )
        require_space(target.parent, chosen[0].size)
        source = cast(BinaryIO, archive.extractfile(chosen[0]))  # it is None for what is no file
        with source, target.open("wb") as writer, progress("unpacking", chosen[0].size) as bar:
            copy_stream(source, writer, bar)


def _checkpoints_of(members: list[tarfile.TarInfo]) -> list[tarfile.TarInfo]:
    """The members that may be the language model's checkpoint: one of audiocraft's own names, or else all by suffix."""
    for name in (TRAINING_FILE, LM_FILE):
        if named := [member for member in members if os.path.basename(member.name) == name]:
            return named
    suffixes = (".th", ".pt", ".pth", ".bin", ".ckpt", ".tar", ".safetensors")
    return [
        member
        for member in members
        if member.name.endswith(suffixes) and os.path.basename(member.name) != COMPRESSION_FILE
    ]


@contextmanager
def _decompressed(file: Path) -> Iterator[BinaryIO]:
    import bz2
    import gzip
    import lzma

    with file.open("rb") as opened:
        head = opened.read(2)
    openers: dict[bytes, Any] = {b"\x1f\x8b": gzip.open, b"BZ": bz2.open, b"\xfd7": lzma.open}
    opener = openers.get(head)
    if opener is None:
        raise ValueError("Python has no reader for this compression")
    with opener(file, "rb") as source:
        yield cast(BinaryIO, source)
