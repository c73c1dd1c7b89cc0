"""What goes to the engine's process and what comes back: plain, immutable, picklable."""

from __future__ import annotations

import math
import pickle
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
from numpy.typing import NDArray

from handler.params import Clip, GenerationParams


@dataclass(frozen=True, slots=True)
class StyleCard:
    """What a style model looks at of a piece of audio.

    Attributes:
        sample_rate: of the excerpt, in Hz.
        excerpt_length: its seconds, if the request does not say.
        use_middle: it is the middle of the audio; else it begins where the request's seed says.
        num_codebooks: of its quantizer; 0: it has none.
    """

    sample_rate: int
    excerpt_length: float
    use_middle: bool
    num_codebooks: int


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
        concurrency: how many requests run together.
        melody: the kind of audio it is conditioned on, `chroma` or `style`; None: none.
        style: of a style model.
    """

    sample_rate: int
    channels: int
    frame_rate: float
    window: float
    conditioners: tuple[str, ...]
    device: str
    dtype: str
    concurrency: int
    melody: str | None
    style: StyleCard | None = None


@dataclass(frozen=True, slots=True)
class Status:
    """What the engine is doing.

    Attributes:
        waiting, running: requests.
        rows: rows in use, at the last report.
        steps_per_second: decode steps, at the last report.
        restarts: of the engine's process.
    """

    waiting: int
    running: int
    rows: int
    steps_per_second: float
    restarts: int


@dataclass(frozen=True, slots=True)
class Job:
    """One request for the engine.

    Attributes:
        id: names the job in `Engine.cancel`, in events and in the log.
        clip: the texts and waveforms to generate from.
        params: how to generate; `params.seed` is set.
        stream: audio is sent on as it comes, so it cannot be taken back if the engine dies.
        deadline: on `time.monotonic`'s clock, when the job is given up.
        arrival: orders jobs, whenever they are given to a process: one that is run again keeps its place.
    """

    id: str
    clip: Clip
    params: GenerationParams
    stream: bool = False
    deadline: float = math.inf
    arrival: int = 0


@dataclass(frozen=True, slots=True)
class Cancel:
    """Gives a job up."""

    id: str


@dataclass(frozen=True, slots=True)
class Wake:
    """There is something new to look at."""


@dataclass(frozen=True, slots=True)
class Close:
    """Ends the process."""


Command = Job | Cancel | Wake | Close


@dataclass(frozen=True, slots=True)
class Ready:
    """The model is loaded."""

    card: Card


@dataclass(frozen=True, slots=True)
class LoadFailed:
    """The model cannot be loaded, and why."""

    message: str
    traceback: str


@dataclass(frozen=True, slots=True)
class Load:
    """How busy the process is, told every second and when it falls idle.

    Attributes:
        rows: rows in use.
        steps_per_second: decode steps, each of which serves all rows.
    """

    rows: int
    steps_per_second: float


@dataclass(frozen=True, slots=True)
class Preparing:
    """The engine begins to encode what the job is conditioned on."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """It is encoded; the job waits for free rows."""


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has begun with the music."""


@dataclass(frozen=True, slots=True)
class Restarted:
    """The engine died and will begin anew: audio that came before counts no more."""


@dataclass(frozen=True, slots=True)
class Progress:
    """`done` of `total` decode steps are made."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Audio:
    """The next stretch of the clip, float32 `[C, T]`."""

    wav: NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Done:
    """The clip is complete; its codes, int64 `[K, frames]`."""

    codes: NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Failed:
    """There will be no more: a RequestError, or one of the errors below."""

    error: Exception


Event = Ready | LoadFailed | Load | Preparing | Prepared | Started | Restarted | Progress | Audio | Done | Failed


def packed(message: object) -> bytes:
    """A message as it goes through a pipe.

    `Connection.send` would not do: torch has it pass tensors through shared memory, of which a container has 64 MB.
    """
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL)


def send(connection: Connection, message: object) -> None:
    """Sends what `receive` gives at the other end."""
    connection.send_bytes(packed(message))


def receive(connection: Connection) -> Any:
    """Waits for the next message; raises EOFError when the other end is closed."""
    return pickle.loads(connection.recv_bytes())


class EngineError(Exception):
    """The engine gave a job up."""


class EngineBusyError(EngineError):
    """There is no room for one more job.

    Attributes:
        reason: what is full.
        retry_after: seconds after which there may be room.
    """

    def __init__(self, reason: str, retry_after: int) -> None:
        super().__init__(f"{reason}; try again in {retry_after} s")
        self.reason = reason
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type[EngineBusyError], tuple[str, int]]:
        return type(self), (self.reason, self.retry_after)


class EngineUnavailableError(EngineError):
    """There is no engine, and why.

    Attributes:
        retry_after: seconds after which there may be one.
    """

    retry_after = 5


class ModelError(EngineError):
    """What the model raised on a job, as text."""


class EngineDiedError(EngineError):
    """The engine died with this job, and it cannot be run again."""


class DeadlineExceededError(EngineError):
    """The job's deadline passed before its clip was finished."""


class JobCancelledError(EngineError):
    """Someone cancelled the job."""
