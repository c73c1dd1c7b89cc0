"""What the offline API is given, brought to the types that the model takes; an error names the argument."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from handler.errors import RequestError

MIN_RATE, MAX_RATE = 1_000, 768_000  # Hz
RATE_STEP = 25
"""Rates are multiples of this, as all common ones are: the resampler's filter for 44,101 Hz would take 6 GB."""

# Integer samples are fractions of full scale, as in audio files: value = (sample - offset) / scale.
_INTEGERS = {
    torch.int16: (0, 2.0**15),
    torch.int32: (0, 2.0**31),
    torch.int8: (0, 2.0**7),
    torch.uint8: (128, 2.0**7),
}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TYPES = "float16, bfloat16, float32, float64, int8, int16, int32 or uint8"


def as_descriptions(value: object, name: str = "descriptions") -> list[str | None]:
    """A list of texts, each of which may be None.

    Raises:
        RequestError: for anything else, such as a single text, and for a text that is not valid Unicode.
    """
    if isinstance(value, str | bytes):
        raise RequestError(name, f"must be a list of texts, not one text; write [{value!r}]")
    if isinstance(value, Mapping) or not isinstance(value, Iterable):
        raise RequestError(name, f"must be a list of texts or None, not {_what(value)}")
    texts = list(value)
    for i, text in enumerate(texts):
        if text is not None and not isinstance(text, str):
            raise RequestError(name, f"must be a list of texts or None; item {i} is {_what(text)}")
        try:
            (text or "").encode()
        except UnicodeEncodeError as error:
            raise RequestError(name, f"item {i} is not valid Unicode: {error}") from error
    return [None if text is None else str(text) for text in texts]


def as_batch(value: object, name: str) -> list[Tensor]:
    """One tensor or NumPy array `[B, C, T]` or `[C, T]` -> B waveforms, float32 `[C, T]`.

    Raises:
        RequestError: as `as_audio`.
    """
    samples = _as_tensor(value, name)
    if samples.dim() == 2:
        samples = samples[None]
    if samples.dim() != 3:
        raise RequestError(
            name, f"must be [batch, channels, time] or [channels, time], not of shape {list(samples.shape)}"
        )
    return [as_audio(item, name) for item in samples]


def as_melodies(value: object, name: str) -> list[Tensor | None]:
    """What `as_batch` takes, or a list of tensors or NumPy arrays `[C, T]`, each of which may be None.

    Raises:
        RequestError: as `as_audio`.
    """
    if isinstance(value, Tensor | np.ndarray):
        return list(as_batch(value, name))
    if isinstance(value, str | bytes | Mapping) or not isinstance(value, Iterable):
        raise RequestError(name, f"must be a tensor or array, or a list of them and None, not {_what(value)}")
    return [None if item is None else as_audio(item, name) for item in value]


def as_audio(value: object, name: str) -> Tensor:
    """A tensor or NumPy array `[C, T]` -> float32 `[C, T]` on the CPU.

    Floats are taken as they are, with a full scale of 1; integers are divided by their full scale.

    Raises:
        RequestError: for another type or shape, no samples, and values that are not finite.
    """
    samples = _as_tensor(value, name)
    if samples.dim() != 2:
        hint = "; write wav[None]" if samples.dim() == 1 else ""
        raise RequestError(name, f"must be [channels, time], not of shape {list(samples.shape)}{hint}")
    channels, length = samples.shape
    if channels == 0 or length == 0:
        raise RequestError(name, f"must hold at least one sample, not have the shape {list(samples.shape)}")
    if channels > length and channels > 8:
        raise RequestError(name, f"must be [channels, time], not [time, channels] = {list(samples.shape)}; write wav.T")
    if samples.dtype in _INTEGERS:
        offset, scale = _INTEGERS[samples.dtype]
        return (samples.double() - offset).div(scale).float()
    if samples.dtype not in _FLOATS:
        raise RequestError(name, f"must be of dtype {_TYPES}, not {str(samples.dtype).removeprefix('torch.')}")
    wav = samples.float()
    if not bool(wav.isfinite().all()):
        place = (~wav.isfinite()).nonzero()[0].tolist()
        raise RequestError(name, f"must be finite numbers; sample {place[1]} of channel {place[0]} is not")
    return wav


def as_rate(value: Any, name: str) -> int:
    """A sample rate in Hz: a whole number of any type, NumPy's too.

    Raises:
        RequestError: for anything else, and out of bounds.
    """
    rate = _whole(value)
    if rate is None or not MIN_RATE <= rate <= MAX_RATE or rate % RATE_STEP:
        raise RequestError(
            name,
            f"must be a whole number of Hz from {MIN_RATE} to {MAX_RATE} and a multiple of {RATE_STEP}, "
            f"not {_what(value)}; resample the audio first",
        )
    return rate


def as_count(value: Any, name: str) -> int:
    """A whole number of at least 1. Raises RequestError for anything else."""
    count = _whole(value)
    if count is None or count < 1:
        raise RequestError(name, f"must be a whole number of at least 1, not {_what(value)}")
    return count


def _whole(value: Any) -> int | None:
    if isinstance(value, bool | np.bool_):
        return None
    if isinstance(value, float | np.floating):
        return int(value) if float(value).is_integer() else None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _as_tensor(value: object, name: str) -> Tensor:
    """A dense tensor on the CPU, without gradients."""
    if isinstance(value, np.ndarray):
        if value.dtype.kind not in "fiu" or (value.dtype.kind == "u" and value.dtype.itemsize > 1):
            raise RequestError(name, f"must be of dtype {_TYPES}, not {value.dtype}")
        native = value.dtype.newbyteorder("=") if value.dtype.itemsize <= 8 else np.dtype(np.float64)
        return torch.from_numpy(np.array(value, native, order="C"))  # a copy: it may be read-only or reversed
    if not isinstance(value, Tensor):
        raise RequestError(name, f"must be a tensor or a NumPy array, not {_what(value)}")
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise RequestError(name, "must be a dense tensor that holds values")
    return value.detach().cpu()


def _what(value: object) -> str:
    """A value in an error message; large ones by their type."""
    if value is None or isinstance(value, bool | int | float | np.generic):
        return repr(value)
    if isinstance(value, str) and len(value) <= 40:
        return repr(value)
    return f"a {type(value).__name__}"
