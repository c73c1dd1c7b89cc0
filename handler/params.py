"""What one piece of music is made from, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np
from torch import Tensor

from handler.errors import RequestError
from handler.lm.sampling import Sampling

LONGEST_SECONDS = 86_400
"""Of one clip: a day, whose codes take 70 MB."""

STYLE_FIELDS = ("eval_q", "excerpt_length", "ds_factor", "encodec_n_q")
"""Those of `GenerationParams` that only a style model takes."""


@dataclass(frozen=True, slots=True)
class GenerationParams:
    """How to generate; the names, meanings and defaults of audiocraft's `set_generation_params`.

    Attributes:
        use_sampling: draw tokens; else take the likeliest.
        top_k: draw from the k likeliest tokens; 0 is off, more than the number of codes means all.
        top_p: draw from the likeliest tokens that sum to p; wins over `top_k`; 0 is off.
        temperature: divides the logits; 0 takes the likeliest.
        duration: seconds of the result, a continued prompt included.
        cfg_coef: classifier-free guidance coefficient.
        cfg_coef_beta: coefficient of double guidance (MusicGen-Style, section 4.3), or None.
        two_step_cfg: make the null condition apart, so without the padding of the other. Unlike audiocraft, the
            coefficient given is honoured. Ignored with `cfg_coef_beta`.
        extend_stride: seconds between windows of music longer than `max_duration`; None is the model's own.
        seed: the draws are a function of it; None draws one. The clips of one call share it.
        eval_q, excerpt_length, ds_factor, encodec_n_q: of the style conditioner; None is the checkpoint's.

    Numbers may be NumPy's; they become Python's.

    Raises:
        RequestError: for a value of another type or out of bounds.
    """

    use_sampling: bool = True
    top_k: int = 250
    top_p: float = 0.0
    temperature: float = 1.0
    duration: float = 30.0
    cfg_coef: float = 3.0
    cfg_coef_beta: float | None = None
    two_step_cfg: bool = False
    extend_stride: float | None = None
    seed: int | None = None
    eval_q: int | None = None
    excerpt_length: float | None = None
    ds_factor: int | None = None
    encodec_n_q: int | None = None

    def __post_init__(self) -> None:
        for names, convert in ((_FLAGS, as_flag), (_WHOLE, as_whole), (_NUMBERS, as_number)):
            for name in names:
                value = getattr(self, name)
                if value is not None or name not in _MAY_BE_NONE:
                    object.__setattr__(self, name, convert(name, value))
        if not 0 < self.duration <= LONGEST_SECONDS:
            raise RequestError(
                "duration", f"must be a number of seconds above 0 and at most {LONGEST_SECONDS}, not {self.duration}"
            )
        if self.top_k < 0:
            raise RequestError("top_k", f"must be 0 (off) or more, not {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise RequestError("top_p", f"must be 0 (off) to 1, not {self.top_p}")
        if not self.temperature >= 0:
            raise RequestError("temperature", f"must be 0 (greedy) or more, not {self.temperature}")
        for field in ("extend_stride", "excerpt_length"):
            if (seconds := getattr(self, field)) is not None and seconds <= 0:
                raise RequestError(field, f"must be a number of seconds above 0, not {seconds}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestError("seed", f"must be 0 to 2^63 - 1, not {self.seed}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.use_sampling, self.temperature, self.top_k, self.top_p)


_FLAGS = ("use_sampling", "two_step_cfg")
_WHOLE = ("top_k", "seed", "eval_q", "ds_factor", "encodec_n_q")
_NUMBERS = ("top_p", "temperature", "duration", "cfg_coef", "cfg_coef_beta", "extend_stride", "excerpt_length")
_MAY_BE_NONE = ("cfg_coef_beta", "extend_stride", "seed", *STYLE_FIELDS)


def as_flag(name: str, value: object) -> bool:
    """True or false, NumPy's too. Raises RequestError for anything else."""
    if not isinstance(value, bool | np.bool_):
        raise RequestError(name, f"must be true or false, not {value!r}")
    return bool(value)


def as_whole(name: str, value: object) -> int:
    """A whole number, NumPy's too. Raises RequestError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise RequestError(name, f"must be a whole number, not {value!r}")
    return int(value)


def as_number(name: str, value: object) -> float:
    """A finite number, NumPy's too. Raises RequestError for anything else."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise RequestError(name, f"must be a number, not {value!r}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RequestError(name, f"must be a finite number, not {value}")
    return number


@dataclass(frozen=True, slots=True)
class Clip:
    """What one piece of music is made from.

    Attributes:
        description: text; empty or None is no text.
        melody: float32 `[C, T]`, the melody to follow or the excerpt whose style to take.
        melody_sample_rate: its rate in Hz.
        continuation: float32 `[C, T]`, the audio to continue.
        continuation_sample_rate: its rate in Hz.
    """

    description: str | None = None
    melody: Tensor | None = None
    melody_sample_rate: int | None = None
    continuation: Tensor | None = None
    continuation_sample_rate: int | None = None
