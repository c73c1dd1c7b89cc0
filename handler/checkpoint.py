"""Opens audiocraft's exported checkpoint files, trusting nothing in them."""

from __future__ import annotations

import ctypes
import mmap
import pickle
import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from handler.errors import CheckpointError

LM_FILE = "state_dict.bin"
COMPRESSION_FILE = "compression_state_dict.bin"


class Config(Mapping[str, Any]):
    """A part of an `xp.cfg`, whose `${…}` are resolved when a value is read and not before.

    Published configs hold interpolations that only resolve on the machine they were trained on, in parts that
    inference never reads.

    Args:
        node: the part.
        path: its key, for messages.
        source: the file it comes from, for messages.
    """

    def __init__(self, node: DictConfig, path: str, source: str) -> None:
        self._node, self.path, self.source = node, path, source

    @classmethod
    def parse(cls, text: str, source: str) -> Config:
        """Reads the YAML of an `xp.cfg`.

        Raises:
            CheckpointError: if it is not a YAML mapping.
        """
        try:
            node = OmegaConf.create(text)
        except (OmegaConfBaseException, YAMLError) as error:
            raise CheckpointError(f"{source}: its xp.cfg is not readable YAML: {error}") from error
        if not isinstance(node, DictConfig):
            raise CheckpointError(f"{source}: its xp.cfg is not a mapping of keys.")
        return cls(node, "", source)

    def key(self, name: str) -> str:
        """The full key of one of its entries, as messages name it."""
        return f"{self.path}.{name}" if self.path else name

    def section(self, name: str) -> Config:
        """The mapping under a key, empty where it is absent or null."""
        value = self.get(name)
        if value is None:
            return Config(OmegaConf.create({}), self.key(name), self.source)
        if not isinstance(value, Config):
            raise CheckpointError(f"{self.source}: {self.key(name)} of its xp.cfg must be a mapping, not {value!r}.")
        return value

    def __getitem__(self, name: str) -> Any:
        if name not in self._node:
            raise KeyError(name)
        try:
            value = self._node[name]
            if isinstance(value, DictConfig):
                return Config(value, self.key(name), self.source)
            return OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
        except OmegaConfBaseException as error:
            raise CheckpointError(
                f"{self.source}: {self.key(name)} of its xp.cfg cannot be resolved: {str(error).splitlines()[0]}"
            ) from error

    def __iter__(self) -> Iterator[str]:
        return (str(name) for name in self._node)

    def __len__(self) -> int:
        return len(self._node)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An exported model: how it is built, and its parameters.

    Attributes:
        source: the file, for messages.
        config: its `xp.cfg`.
        state: its parameters by name, still in the file if they are `mapped`: nobody writes to them then.
    """

    source: str
    config: Config
    state: dict[str, Tensor]
    mapped: bool = False

    def release(self) -> None:
        """Takes the pages of a mapped file out of this process's memory; the next look brings them back.

        A page once read counts as this process's memory as long as the file is mapped, though a copy of it is kept.
        """
        if not self.mapped or sys.platform != "linux":
            return
        bounds = _addresses(self.state)
        first, last = -(-bounds.start // mmap.PAGESIZE), bounds.stop // mmap.PAGESIZE  # whole pages
        if first < last:
            size = (last - first) * mmap.PAGESIZE
            ctypes.CDLL(None).madvise(ctypes.c_void_p(first * mmap.PAGESIZE), ctypes.c_size_t(size), mmap.MADV_DONTNEED)


@dataclass(frozen=True, slots=True)
class Pointer:
    """A compression checkpoint that only names another model (`{'pretrained': name}`)."""

    source: str
    name: str


def read_checkpoint(path: Path) -> Checkpoint | Pointer:
    """Reads an exported checkpoint file.

    Only tensors and plain types are unpickled (`weights_only`), and the tensors stay in the file until they are used.

    Raises:
        CheckpointError: if the file is absent, cut short, holds foreign classes, or is not an export.
    """
    package = _load(path)
    if not isinstance(package, dict):
        raise CheckpointError(f"{path} holds a {type(package).__name__}, not an exported checkpoint. {_EXPORT}")
    if "pretrained" in package:
        return Pointer(str(path), str(package["pretrained"]))
    if "best_state" not in package and {"model", "optimizer", "fsdp_best_state"} & set(package):
        raise CheckpointError(f"{path} is a training checkpoint. {_EXPORT}")
    missing = [key for key in ("best_state", "xp.cfg") if key not in package]
    if missing:
        raise CheckpointError(f"{path} has no key {missing[0]!r}, only {sorted(map(str, package))[:6]}. {_EXPORT}")
    state, config = package["best_state"], package["xp.cfg"]
    if not isinstance(state, dict) or not isinstance(config, str):
        raise CheckpointError(f"{path} is a training checkpoint. {_EXPORT}")
    strange = [name for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if strange:
        raise CheckpointError(f"{path} is a training checkpoint: best_state[{strange[0]!r}] is no tensor. {_EXPORT}")
    # Memory that is no file's would be lost when it is released; so tensors that lie elsewhere are never released.
    mapped = len(_addresses(state)) <= path.stat().st_size
    return Checkpoint(str(path), Config.parse(config, str(path)), state, mapped)


def _addresses(state: Mapping[str, Tensor]) -> range:
    """From the first tensor's first byte to the last one's last."""
    tensors = [tensor for tensor in state.values() if tensor.layout is torch.strided and tensor.numel()]
    return range(
        min((tensor.data_ptr() for tensor in tensors), default=0),
        max((tensor.data_ptr() + tensor.nbytes for tensor in tensors), default=0),
    )


_EXPORT = "Export it first: `python -m archive_scripts export CHECKPOINT_FOLDER OUT`."


def _load(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. A checkpoint folder holds {LM_FILE} and {COMPRESSION_FILE}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"(?:Unsupported global: )?GLOBAL `?([\w.]+)`?", str(error))
        name = foreign.group(1) if foreign else "an unknown class"
        if name.startswith("omegaconf."):
            raise CheckpointError(f"{path} is a training checkpoint (it holds {name}). {_EXPORT}") from error
        raise CheckpointError(
            f"{path} holds the class {name}, and a checkpoint may hold only tensors and plain types. Loading it could "
            "run code of whoever made it, so it is refused; get the file from its publisher again."
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{path} cannot be read: it is cut short or damaged ({str(error).splitlines()[0]}). Download it again."
        ) from error


def load_parameters(module: nn.Module, state: Mapping[str, Tensor], source: str, prefix: str = "") -> None:
    """Gives a module on the meta device its parameters, without copying them.

    Args:
        module: built from the same checkpoint's config.
        state: tensors by name.
        source: the file, for messages.
        prefix: of the names in the file, for messages.

    Raises:
        CheckpointError: for a missing key, an unexpected key, or a wrong shape.
    """
    expected = module.state_dict()
    for name, parameter in expected.items():
        if name not in state:
            raise CheckpointError(
                f"{source} lacks the key {prefix + name!r}, which its xp.cfg asks for. The file is incomplete, or its "
                "xp.cfg belongs to another model; download or export it again."
            )
        if state[name].shape != parameter.shape:
            raise CheckpointError(
                f"{source}: {prefix + name!r} has shape {list(state[name].shape)}, but its xp.cfg asks for "
                f"{list(parameter.shape)}. Its xp.cfg belongs to another model; download or export it again."
            )
    unexpected = [name for name in state if name not in expected]
    if unexpected:
        raise CheckpointError(
            f"{source} has the key {prefix + unexpected[0]!r}, for which its xp.cfg has no use "
            f"({len(unexpected)} such keys). Its xp.cfg belongs to another model; download or export it again."
        )
    module.load_state_dict(dict(state), assign=True)
