"""What goes into the engine and what comes out: plain, immutable, picklable."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from handler.params import Clip, GenerationParams


@dataclass(frozen=True, slots=True)
class Card:
    """What the loaded model is; nothing of it changes while the engine lives.

    Attributes:
        sample_rate: of its audio, in Hz.
        channels: 1 or 2.
        frame_rate: frames of codes a second.
        window: seconds the model generates in one go; what is longer is made window by window.
        conditioners: the names of its conditioners, as ("description",) or ("description", "self_wav").
        device: where it runs, as `cpu` or `cuda:0`.
        dtype: its language model's number format, as `float32`.
        melody: the kind of audio it is conditioned on, `chroma` or `style`; None: none.
    """

    sample_rate: int
    channels: int
    frame_rate: float
    window: float
    conditioners: tuple[str, ...]
    device: str
    dtype: str
    melody: str | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One request for the engine.

    Attributes:
        id: names the job in `Engine.cancel` and in the log.
        clip: the texts and waveforms to generate from.
        params: how to generate; `params.seed` is set.
        deadline: on `time.monotonic`'s clock, when the job is given up.
    """

    id: str
    clip: Clip
    params: GenerationParams
    deadline: float = math.inf


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` decode steps are made."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Finished:
    """The clip: wav float32 [C, T] at `sample_rate`, and its codes, int64 [K, frames] at `frame_rate`."""

    wav: Tensor
    sample_rate: int
    frame_rate: float
    codes: Tensor


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no clip: a RequestError, one of the errors below, or what the model raised."""

    error: Exception


Event = Progress | Finished | Failed


class EngineError(Exception):
    """The engine gave a job up."""


class EngineBusyError(EngineError):
    """The queue is full.

    Attributes:
        retry_after: seconds after which a place may be free.
    """

    def __init__(self, max_queue: int, retry_after: int) -> None:
        super().__init__(f"{max_queue} requests are waiting already; try again in {retry_after} s")
        self.max_queue = max_queue
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[EngineBusyError], tuple[int, int]]:
        return type(self), (self.max_queue, self.retry_after)


class EngineClosedError(EngineError):
    """The engine has ended or is ending."""


class DeadlineExceededError(EngineError):
    """The job's deadline passed before its clip was finished."""


class JobCancelledError(EngineError):
    """Someone cancelled the job."""
