"""What one piece of music is made from, and how."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from handler.errors import RequestError
from handler.lm.sampling import Sampling

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

    Raises:
        RequestError: for a value out of bounds.
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
        if not (math.isfinite(self.duration) and self.duration > 0):
            raise RequestError("duration", f"must be a number of seconds above 0, not {self.duration}")
        if self.top_k < 0:
            raise RequestError("top_k", f"must be 0 (off) or more, not {self.top_k}")
        if not 0 <= self.top_p <= 1:
            raise RequestError("top_p", f"must be 0 (off) to 1, not {self.top_p}")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise RequestError("temperature", f"must be 0 (greedy) or more, not {self.temperature}")
        for field in ("cfg_coef", "cfg_coef_beta"):
            value = getattr(self, field)
            if value is not None and not math.isfinite(value):
                raise RequestError(field, f"must be a finite number, not {value}")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise RequestError("seed", f"must be 0 to 2^63 - 1, not {self.seed}")

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.use_sampling, self.temperature, self.top_k, self.top_p)


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
