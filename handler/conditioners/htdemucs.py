"""htdemucs (Rouard et al. 2023): takes a mix apart, so that what carries the melody can be kept."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
import re
import textwrap
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import safetensors
import torch
from demucs.apply import apply_model
from demucs.htdemucs import HTDemucs
from safetensors.torch import save_file
from torch import Tensor

from handler.audio import convert_audio
from handler.errors import CheckpointError
from handler.finite import require_finite
from handler.model_folder import require_json, require_safetensors
from handler.torch_file import ForeignClassError, read_torch_file

logger = logging.getLogger(__name__)

WEIGHTS_FILE, CONFIG_FILE = "htdemucs.safetensors", "htdemucs.json"
"""What `convert_htdemucs` writes: the parameters, and the arguments of the model's class."""

PICKLED_FILES = ("htdemucs.th", "955717e8-8726e21a.th")
"""What demucs itself publishes; the second part of a name is the beginning of the file's sha256."""

HUB_FILE = "955717e8.safetensors"
"""What demucs 4.1 publishes on the Hugging Face hub: the arguments are in the file's own metadata."""

MELODY_STEMS = ("vocals", "other")

_CLASS = "demucs.htdemucs.HTDemucs"
_PUBLISHED = f"Get {PICKLED_FILES[1]} from demucs' publisher, or {HUB_FILE} from adefossez/HTDemucs on the hub."

Description = tuple[dict[str, Any], dict[str, Tensor]]
"""The arguments of the model's class, and its parameters as they are stored."""


class MelodySeparator:
    """Keeps the vocals and the other pitched instruments of a mix, and drops drums and bass.

    Nothing is random: demucs' shift trick, which averages over random offsets in time, is off. Always float32.

    Args:
        model: demucs' own.
    """

    def __init__(self, model: HTDemucs) -> None:
        self.model = model
        self._melody = [list(model.sources).index(stem) for stem in MELODY_STEMS]

    def __call__(self, wav: Tensor, sample_rate: int) -> Tensor:
        """Mono audio `[T]` -> its melody, mono `[T]` or a sample less, both at `sample_rate` in Hz."""
        mix = convert_audio(wav[None], sample_rate, self.model.samplerate, self.model.audio_channels)  # [C, T']
        melody = self.stems(mix[None])[0, self._melody].sum(dim=0).mean(dim=0)  # [T']
        return convert_audio(melody[None], self.model.samplerate, sample_rate, 1)[0]

    def stems(self, mix: Tensor) -> Tensor:
        """Audio `[B, C, T]` at the model's rate -> its stems `[B, sources, C, T]`, in overlapping segments."""
        return apply_model(self.model, mix, shifts=0, device=mix.device)


def load_htdemucs(folder: Path) -> HTDemucs:
    """The model of a folder, in float32, ready to run on the CPU.

    The folder holds what `convert_htdemucs` wrote, or one of `PICKLED_FILES`, or `HUB_FILE`, looked for in this order.
    Nothing is fetched, no random number is drawn, and of a pickle only tensors and plain values are read.

    Raises:
        CheckpointError: if there is none of them, or it is damaged, or holds anything else.
    """
    source = _find(folder)
    return _build(*_read(source), source)


def convert_htdemucs(source: Path, target_folder: Path) -> None:
    """Writes a model of demucs as safetensors and plain JSON, the same bytes each time.

    Parameters keep the type they are stored in (float16 in what is published).

    Args:
        source: a folder that `load_htdemucs` can read, or the file itself.
        target_folder: gets `WEIGHTS_FILE` and `CONFIG_FILE`; made if absent.

    Raises:
        CheckpointError: as `load_htdemucs`.
    """
    source = _find(source) if source.is_dir() else source
    kwargs, state = _read(source)
    _build(kwargs, state, source)  # or what is written could not be loaded
    # demucs counts its segments in exact fractions of seconds, which JSON has only as text (`39/5`).
    segment = kwargs.get("segment", inspect.signature(HTDemucs).parameters["segment"].default)
    try:
        config = json.dumps(
            kwargs | {"segment": str(Fraction(str(segment)))}, indent=2, sort_keys=True, allow_nan=False
        )
    except (ArithmeticError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source}: an argument of its model is not a plain value: {_reason(error)}. {_PUBLISHED}"
        ) from error
    target_folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}
    save_file(tensors, target_folder / WEIGHTS_FILE)
    (target_folder / CONFIG_FILE).write_text(config + "\n", encoding="utf-8")


def _find(folder: Path) -> Path:
    for name in (WEIGHTS_FILE, *PICKLED_FILES, HUB_FILE):
        if (folder / name).is_file():
            return folder / name
    raise CheckpointError(
        f"{folder} holds no htdemucs: none of {WEIGHTS_FILE}, {', '.join(PICKLED_FILES)} and {HUB_FILE}. {_PUBLISHED}"
    )


def _read(source: Path) -> Description:
    if not source.is_file():
        raise CheckpointError(f"{source} does not exist. {_PUBLISHED}")
    return _read_safetensors(source) if source.suffix == ".safetensors" else _read_pickled(source)


def _read_safetensors(source: Path) -> Description:
    described = source.with_name(CONFIG_FILE) if source.name == WEIGHTS_FILE else source
    try:
        require_safetensors(source)
        with safetensors.safe_open(source, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (a reader, not a mapping)
        if described is not source:
            require_json(described)
            args, kwargs = [], json.loads(described.read_text(encoding="utf-8"))
            kwargs["segment"] = Fraction(kwargs["segment"])
        elif metadata.get("klass") == _CLASS and "structure" not in metadata:
            args, kwargs = (json.loads(metadata[key], object_hook=_fraction) for key in ("args", "kwargs"))
        else:
            raise CheckpointError(f"{source} is not an unquantised htdemucs of demucs 4.1. {_PUBLISHED}")
    except (safetensors.SafetensorError, ArithmeticError, LookupError, OSError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{source} or its description ({described.name}) cannot be read: {_reason(error)}. {_PUBLISHED}"
        ) from error
    return _named(args, kwargs, source), state


def _read_pickled(source: Path) -> Description:
    signed = re.fullmatch(r".*-([0-9a-f]{8})", source.stem)
    if signed and not _sha256(source).startswith(signed.group(1)):
        raise CheckpointError(f"{source} is damaged: its sha256 does not begin with {signed.group(1)}. {_PUBLISHED}")
    try:
        allowed = [(_Class, _CLASS), (Fraction, "fractions.Fraction")]
        package, _ = read_torch_file(source, allowed, "a model of demucs")
    except ForeignClassError as error:
        raise CheckpointError(
            f"{source} holds {error.name}, and a model of demucs may hold only its own class, tensors and "
            "plain values. Loading it could run its author's code, so it is refused; "
            f"`archive_scripts fetch` converts the published file. {_PUBLISHED}"
        ) from error
    except CheckpointError as error:
        raise CheckpointError(f"{error} {_PUBLISHED}") from error
    if not isinstance(package, dict) or package.get("klass") is not _Class:
        raise CheckpointError(f"{source} is not an htdemucs of demucs ({_CLASS}). {_PUBLISHED}")
    state = package.get("state")
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise CheckpointError(f"{source} holds no plain parameters: it is cut short or quantised. {_PUBLISHED}")
    return _named(package.get("args"), package.get("kwargs"), source), state


class _Class:
    """Stands for demucs' class in a pickle, so that reading one builds no model."""


def _sha256(source: Path) -> str:
    with source.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _named(args: Any, kwargs: Any, source: Path) -> dict[str, Any]:
    """The arguments by name; older files name some that are gone, and demucs drops them too."""
    if not isinstance(args, list | tuple) or not isinstance(kwargs, Mapping):
        raise CheckpointError(f"{source}: the arguments of its model are not a list and a mapping. {_PUBLISHED}")
    parameters = inspect.signature(HTDemucs).parameters
    named = dict(zip(parameters, args, strict=False)) | dict(kwargs)
    unknown = sorted(set(map(str, named)) - set(parameters))
    if unknown:
        logger.info("%s: arguments this demucs does not have are ignored: %s", source, ", ".join(unknown))
    return {name: value for name, value in named.items() if name in parameters}


def _build(kwargs: Mapping[str, Any], state: Mapping[str, Tensor], source: Path) -> HTDemucs:
    try:
        with torch.device("meta"):
            model = HTDemucs(**kwargs)
        model.load_state_dict({name: tensor.float() for name, tensor in state.items()}, assign=True)
        for name, tensor in model.state_dict().items():
            require_finite(tensor, name, str(source))
    except (ArithmeticError, AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{source} does not hold a whole htdemucs: {_reason(error)}. {_PUBLISHED}") from error
    missing = [stem for stem in MELODY_STEMS if stem not in model.sources]
    if missing:
        raise CheckpointError(
            f"{source} separates {', '.join(model.sources)}, and a melody needs {' and '.join(MELODY_STEMS)}. "
            f"It is another model of demucs. {_PUBLISHED}"
        )
    return model.eval().requires_grad_(False)


def _fraction(value: dict[str, Any]) -> Any:
    """demucs' way of writing a fraction in JSON."""
    return Fraction(value["numerator"], value["denominator"]) if value.get("_type") == "fraction" else value


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {textwrap.shorten(str(error), 200)}"
