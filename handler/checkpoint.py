"""Opens audiocraft's exported checkpoint files, trusting nothing in them."""

from __future__ import annotations

import ctypes
import mmap
import os
import shlex
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor, nn
from yaml import YAMLError

from handler.errors import CheckpointError
from handler.file_kind import Kind, file_kind, wrong_kind
from handler.torch_file import ForeignClassError, read_torch_file

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

    @property
    def local_file(self) -> Path | None:
        """The exported codec on this machine that the name leads to, from the pointer's own folder; None: it is a name
        of the hub. As in audiocraft, a folder or file that exists comes first."""
        named = Path(os.path.normpath(Path(self.source).parent / self.name))
        target = named / COMPRESSION_FILE if named.is_dir() else named
        return target if target.is_file() else None


def read_checkpoint(path: Path) -> Checkpoint | Pointer:
    """Reads an exported checkpoint file.

    Only tensors and plain types are unpickled (`weights_only`), and the tensors stay in the file until they are used.

    Raises:
        CheckpointError: if the file is absent, cut short, holds foreign classes, or is not an export. The message says
            what it is, and which command makes an export of it if one can be made.
    """
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist. A checkpoint folder holds {LM_FILE} and {COMPRESSION_FILE}.")
    _require_torch(path)
    try:
        package, mapped = read_torch_file(path)
    except ForeignClassError as error:
        if not error.name.startswith("omegaconf."):
            raise
        raise CheckpointError(
            f"{path} is a training checkpoint, or the file of a fine-tuner: its xp.cfg is a pickled object "
            f"({error.name}). {export_command(path)}"
        ) from error
    if not isinstance(package, dict):
        raise CheckpointError(
            f"{path} holds a {type(package).__name__}, not an exported checkpoint, and no model can be made of it. "
            "Get the checkpoint from its publisher again."
        )
    if "pretrained" in package:
        return Pointer(str(path), str(package["pretrained"]))
    state, config = package.get("best_state"), package.get("xp.cfg")
    if not isinstance(config, str) or not isinstance(state, dict) or not _holds_tensors(state):
        raise CheckpointError(_not_exported(path, package))
    if wrapper := wrapper_of(state):
        raise CheckpointError(
            f"{path} holds a wrapped model: names of its parameters begin with {wrapper!r}. {export_command(path)}"
        )
    # Memory that is no file's would be lost when it is released; so tensors that lie elsewhere are never released.
    mapped = mapped and len(_addresses(state)) <= path.stat().st_size
    return Checkpoint(str(path), Config.parse(config, str(path)), state, mapped)


WRAPPERS = ("module.", "_orig_mod.", "model.", "lm.")
"""What data parallelism, compiling and classes around a model put before the names of its parameters."""


def wrapper_of(state: Mapping[str, Any]) -> str | None:
    """The first of `WRAPPERS` that names of parameters begin with, None if there is none.

    No parameter of a language model or codec has such a name itself.
    """
    return next((wrapper for wrapper in WRAPPERS for name in state if str(name).startswith(wrapper)), None)


def export_command(path: Path, base: bool = False) -> str:
    """Advice to export a file, with the command to copy.

    Args:
        path: the file; one with a codec's name is taken for a codec's.
        base: whether it lacks its configuration, which then comes from a base model.
    """
    arguments = [str(path), "OUT"]
    if path.name == COMPRESSION_FILE:
        arguments = ["--compression", str(path), str(path.with_name(LM_FILE)), "OUT"]
    if base:
        arguments = ["--base", "small", *arguments]
    command = f"Export it first: `python -m archive_scripts export {shlex.join(arguments)}`"
    return f"{command}, where small stands for the model that it was trained from." if base else f"{command}."


def transformers_refusal(path: Path, names: Iterable[object]) -> str | None:
    """What to say of parameters by these names that transformers saved; None: it did not."""
    if not any(str(name).startswith(_TRANSFORMERS) for name in names):
        return None
    return (
        f"{path} holds MusicGen in transformers' own layout, which cannot be loaded here. Get audiocraft's export of "
        "the same model: `python -m archive_scripts fetch small FOLDER`, with its name in the place of small."
    )


_TRANSFORMERS = (
    "decoder.model.decoder.",
    "decoder.lm_heads.",
    "text_encoder.",
    "model.decoder.embed_tokens.",
    "lm_heads.",
)


def _holds_tensors(state: Mapping[Any, Any]) -> bool:
    return all(isinstance(value, Tensor) for value in state.values())


def _not_exported(path: Path, package: Mapping[Any, Any]) -> str:
    """What a torch file is that holds a dictionary and is not an export, and how it becomes one."""
    keys = sorted(map(str, package))
    parameters = package if package and _holds_tensors(package) else {}
    if refusal := transformers_refusal(path, parameters):
        return refusal
    if parameters:
        return f"{path} holds parameters without their configuration (a bare state_dict). {export_command(path, True)}"
    nested = [key for key in STATE_KEYS if isinstance(package.get(key), dict) and package[key]]
    if nested and package.get("xp.cfg") is None:
        return (
            f"{path} has no key 'xp.cfg', only {keys[:6]}: it holds parameters ({nested[0]}) without their "
            f"configuration. {export_command(path, True)}"
        )
    if nested or {"model", "optimizer", "fsdp_best_state"} & set(keys):
        return f"{path} is a training checkpoint (it holds {', '.join(keys[:6])}). {export_command(path)}"
    missing = [key for key in ("best_state", "xp.cfg") if key not in package]
    lack = f"has no key {missing[0]!r}, only {keys[:6]}" if missing else "holds no parameters"
    return (
        f"{path} {lack}: it is not an exported checkpoint, and none can be made of it. Get the checkpoint from its "
        "publisher again."
    )


STATE_KEYS = ("fsdp_best_state", "best_state", "model", "state_dict", "model_state_dict", "lm")
"""Where files keep a model's parameters, the best first."""


def _require_torch(path: Path) -> None:
    """Raises CheckpointError for a file of another kind, with the command to export it where that may be one."""
    found = file_kind(path)
    if found.holds_torch:
        return
    refused = f"{path} is {found.what}, not an exported checkpoint"
    if found.kind in (Kind.TAR, Kind.COMPRESSED):
        raise CheckpointError(f"{refused}; it may hold a fine-tune. {export_command(path)}")
    if found.kind is Kind.SAFETENSORS:
        raise CheckpointError(
            f"{refused}: it holds parameters without their configuration. {export_command(path, True)}"
        )
    raise CheckpointError(wrong_kind(path, "an exported checkpoint", found))


def _addresses(state: Mapping[str, Tensor]) -> range:
    """From the first tensor's first byte to the last one's last."""
    tensors = [tensor for tensor in state.values() if tensor.layout is torch.strided and tensor.numel()]
    return range(
        min((tensor.data_ptr() for tensor in tensors), default=0),
        max((tensor.data_ptr() + tensor.nbytes for tensor in tensors), default=0),
    )


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
