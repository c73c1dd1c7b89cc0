"""Which part of a piece of audio a style model looks at; light, so that the worker cuts it before the engine has it."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def excerpt_of(wav: Tensor, samples: int, use_middle: bool, seed: int) -> Tensor | None:
    """The excerpt of a waveform `[*, T]`: its middle, or where the request's seed says; `[*, samples]`.

    None: the waveform is shorter than that. Of an excerpt itself it is the whole.
    """
    start = excerpt_place(wav.shape[-1], samples, use_middle, seed)
    return None if start is None else wav[..., start : start + samples]


def excerpt_place(length: int, samples: int, use_middle: bool, seed: int) -> int | None:
    """Where the excerpt of a waveform of `length` samples begins; None: the waveform is shorter than it."""
    latest = length - samples
    if latest < 0:
        return None
    return latest // 2 if use_middle else excerpt_start(seed, latest)


def excerpt_start(seed: int, latest: int) -> int:
    """Where a request's excerpt begins: a sample from 0 to `latest`, a function of the request's seed alone.

    The reference draws it from Python's global generator, and so differently every time. Philox is keyed here by the
    seed and 1; by the seed and 0 it draws the tokens.
    """
    return int(np.random.Philox(key=seed + (1 << 64)).random_raw()) * (latest + 1) >> 64
