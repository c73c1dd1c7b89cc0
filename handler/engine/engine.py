"""The engine: a model in a thread of its own, serving one job at a time, first come first served."""

from __future__ import annotations

import asyncio
import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable

from handler.conditioners.provider import DESCRIPTION, SELF_WAV
from handler.conditioners.style import StyleConditioner
from handler.conditioners.t5 import T5Conditioner
from handler.engine.messages import (
    Card,
    DeadlineExceededError,
    EngineBusyError,
    EngineClosedError,
    Event,
    Failed,
    Finished,
    Job,
    JobCancelledError,
    Progress,
)
from handler.errors import RequestError
from handler.musicgen import MusicGen


class Engine:
    """Turns jobs into events.

    `generate` may be iterated from any asyncio loop; every job's events end with exactly one `Finished` or
    `Failed`. Leaving the iteration early gives the job up: a waiting one frees its place, a running one ends at its
    next decode step.
    """

    def __init__(self, load: Callable[[], MusicGen], max_queue: int = 64, max_prompt_tokens: int = 512) -> None:
        """
        Args:
            load: makes the model; called once, in the engine's thread. Picklable.
            max_queue: how many jobs may wait besides the one that runs.
            max_prompt_tokens: the longest description, in tokens of T5; a longer one is a RequestError.
        """
        self._load = load
        self._max_queue = max_queue
        self._max_prompt_tokens = max_prompt_tokens
        self._waiting: deque[_Ticket] = deque()
        self._running: _Ticket | None = None
        self._closed = False
        self._changed = threading.Condition()
        self._card: Card | None = None
        self._load_error: BaseException | None = None
        self._loaded = threading.Event()
        self._last_seconds = 1.0
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)

    def start(self) -> None:
        """Load the model and begin to serve; blocks until then.

        Raises:
            whatever loading raised.
        """
        self._thread.start()
        self._loaded.wait()
        if self._load_error is not None:
            raise self._load_error

    def describe(self) -> Card:
        """What was loaded.

        Raises:
            EngineClosedError: before `start`.
        """
        if self._card is None:
            raise EngineClosedError("the engine has not been started")
        return self._card

    async def generate(self, job: Job) -> AsyncGenerator[Event, None]:
        """Queue the job and give its events as they happen; a full queue or a passed deadline is a `Failed` too."""
        ticket = _Ticket(job, asyncio.get_running_loop())
        refusal = self._admit(ticket)
        if refusal is not None:
            yield Failed(refusal)
            return
        try:
            event: Event = Progress(0, 0)
            while not isinstance(event, Finished | Failed):
                event = await ticket.next_event()
                yield event
        finally:
            self._withdraw(ticket)

    def cancel(self, job_id: str) -> bool:
        """Give up every job of this id; its `generate` ends with `Failed(JobCancelledError)`. False: there is none."""
        with self._changed:
            tickets = [*self._waiting, *([self._running] if self._running else [])]
        chosen = [ticket for ticket in tickets if ticket.job.id == job_id]
        for ticket in chosen:
            ticket.post(Failed(JobCancelledError("the request was cancelled")))
            self._withdraw(ticket)
        return bool(chosen)

    def close(self) -> None:
        """Give up every job, end the thread and let go of the model; a second call does nothing."""
        with self._changed:
            self._closed = True
            tickets = [*self._waiting, *([self._running] if self._running else [])]
            self._waiting.clear()
            self._changed.notify_all()
        for ticket in tickets:
            ticket.post(Failed(EngineClosedError("the engine is closing")))
            ticket.abandoned.set()
        if self._thread.is_alive():
            self._thread.join()

    def _admit(self, ticket: _Ticket) -> Exception | None:
        with self._changed:
            if self._closed or self._card is None:
                return EngineClosedError("the engine is not running")
            idle = self._running is None
            if len(self._waiting) >= self._max_queue + idle:
                return EngineBusyError(self._max_queue, max(1, math.ceil(self._last_seconds)))
            self._waiting.append(ticket)
            self._changed.notify()
            return None

    def _withdraw(self, ticket: _Ticket) -> None:
        ticket.abandoned.set()
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)

    def _serve(self) -> None:
        try:
            model = self._load()
            self._card = _card_of(model)
        except BaseException as error:
            self._load_error = error
            return
        finally:
            self._loaded.set()
        while (ticket := self._next_ticket()) is not None:
            started = time.monotonic()
            outcome = _run(model, ticket, self._max_prompt_tokens)
            with self._changed:
                self._running = None
                self._last_seconds = time.monotonic() - started
            if outcome is not None:
                ticket.post(outcome)

    def _next_ticket(self) -> _Ticket | None:
        with self._changed:
            while not self._waiting and not self._closed:
                self._changed.wait()
            if self._closed:
                return None
            self._running = self._waiting.popleft()
            return self._running


class _Ticket:
    """A job on its way, the thread's end (`post`, `on_step`) and the loop's (`next_event`)."""

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        self.job = job
        self.abandoned = threading.Event()
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def post(self, event: Event) -> None:
        # a closed loop raises; it has nobody left to tell
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next_event(self) -> Event:
        try:
            async with asyncio.timeout(_seconds_until(self.job.deadline)):
                return await self._events.get()
        except TimeoutError:
            return Failed(
                DeadlineExceededError("the request was given up: its timeout passed before the clip was finished")
            )

    def on_step(self, done: int, total: int) -> None:
        """The callback of a generation; raises to stop it."""
        if self.abandoned.is_set() or time.monotonic() > self.job.deadline:
            raise _StoppedError
        self.post(Progress(done, total))


class _StoppedError(Exception):
    """Nobody waits for this generation any more."""


def _seconds_until(deadline: float) -> float | None:
    return None if math.isinf(deadline) else deadline - time.monotonic()


def _run(model: MusicGen, ticket: _Ticket, max_prompt_tokens: int) -> Finished | Failed | None:
    job = ticket.job
    try:
        _check_prompt(model, job.clip.description, max_prompt_tokens)
        wav, codes = model.generate_clip(job.clip, job.params, ticket.on_step)
    except _StoppedError:
        return None
    except Exception as error:
        return Failed(error)
    return Finished(wav.cpu(), model.sample_rate, model.frame_rate, codes.cpu())


def _check_prompt(model: MusicGen, description: str | None, max_tokens: int) -> None:
    conditioner = model.conditioning.texts.get(DESCRIPTION)
    if description and isinstance(conditioner, T5Conditioner):
        tokens = len(conditioner.token_ids(description))
        if tokens > max_tokens:
            raise RequestError("prompt", f"must be a text of at most {max_tokens} tokens, not {tokens}")


def _card_of(model: MusicGen) -> Card:
    return Card(
        sample_rate=model.sample_rate,
        channels=model.audio_channels,
        frame_rate=float(model.frame_rate),
        window=float(model.max_duration),
        conditioners=tuple(model.conditioners),
        device=str(model.device),
        dtype=str(model.dtype).removeprefix("torch."),
        melody=_melody_of(model),
    )


def _melody_of(model: MusicGen) -> str | None:
    conditioner = model.conditioning.wavs.get(SELF_WAV)
    if conditioner is None:
        return None
    return "style" if isinstance(conditioner, StyleConditioner) else "chroma"
