"""The engine as the worker sees it: jobs go in, events come out, and a death of the engine's process is survived."""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from handler.cgroup import available_cores
from handler.engine.memory import give_memory_back
from handler.engine.messages import (
    Audio,
    Cancel,
    Card,
    Close,
    Done,
    EngineBusyError,
    EngineDiedError,
    EngineUnavailableError,
    Event,
    Failed,
    Job,
    JobCancelledError,
    Load,
    LoadFailed,
    Prepared,
    Preparing,
    Ready,
    Restarted,
    Started,
    Status,
    packed,
    receive,
)
from handler.engine.outbox import Message, Outbox
from handler.engine.process import run
from handler.engine.spec import ModelSpec
from handler.engine.suspicion import Suspicion
from handler.engine.ticket import Ticket, UnreadAudio
from handler.errors import RequestError
from handler.params import Clip

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries to load the model again
_GRACE = 5.0  # seconds the process has to leave by itself when the engine is closed

READERS = 2
"""Threads that read the audio of jobs, at most one a core; each has a decoder, a process of at most 0.6 GB."""


class Engine:
    """Turns jobs into events, in a process of its own.

    `generate` may be iterated from any asyncio loop. When the process dies, another is started and retries every job (a
    job is deterministic), except streams that have already sent audio, which end. The first retry runs all jobs
    together. If the process dies again, `Suspicion` finds the job that kills it, and only that job fails.

    Args:
        spec: what the process loads.
        max_queue: how many jobs may wait besides those that run.
        audio_budget: bytes of audio that all jobs may have together (`UnreadAudio.size`).
    """

    def __init__(self, spec: ModelSpec, max_queue: int, audio_budget: int) -> None:
        self._spec = spec
        self._max_queue = max_queue
        self._audio_budget = audio_budget
        self._readers = ThreadPoolExecutor(min(READERS, available_cores()), "read")
        self._lock = threading.RLock()
        self._keys = itertools.count()
        self._tickets: dict[str, Ticket] = {}
        self._suspicion = Suspicion(self._tickets)
        self._connection: Connection | None = None
        self._outbox: Outbox | None = None
        self._process: SpawnProcess | None = None
        self._card: Card | None = None
        self._unavailable = "the engine has not been started"
        self._closed = threading.Event()
        self._load = Load(0, 0.0)
        self._restarts = 0
        self._seconds = 1.0  # of a job, of late
        self._supervisor = threading.Thread(target=self._supervise, name="engine", daemon=True)

    def start(self) -> None:
        """Loads the model; blocks until it is there.

        Raises:
            EngineUnavailableError: with the cause, if it cannot be loaded.
        """
        self._spawn()
        self._supervisor.start()

    def describe(self) -> Card:
        """What was loaded.

        Raises:
            EngineUnavailableError: before `start`.
        """
        if self._card is None:
            raise EngineUnavailableError(self._unavailable)
        return self._card

    def status(self) -> Status:
        """What is going on."""
        with self._lock:
            running = sum(ticket.started for ticket in self._tickets.values())
            waiting = len(self._tickets) - running
        return Status(waiting, running, self._load.rows, self._load.steps_per_second, self._restarts)

    async def generate(self, job: Job, audio: UnreadAudio | None = None) -> AsyncGenerator[Event, None]:
        """Queues a job and gives its events, the last of which is `Done` or `Failed`.

        Leaving the iteration early gives the job up: its rows are free at the next decode step.

        Args:
            job: all of it but `audio`.
            audio: that its clip lacks; it is read once the job has its place.
        """
        ticket = Ticket(job, audio, asyncio.get_running_loop())
        del audio  # it holds what was uploaded, and the ticket lets go of it
        try:
            key = self._admit(ticket)
        except (EngineBusyError, EngineUnavailableError) as error:
            yield Failed(error)
            return
        started = time.monotonic()
        event: Event = Started()
        try:
            if ticket.audio is None:
                self._complete(key, ticket, job.clip)
            else:
                self._readers.submit(self._read_audio, key, ticket)
            while not isinstance(event, Done | Failed):
                event = await ticket.next_event()
                yield event
        finally:
            self._withdraw(key, finished=isinstance(event, Done))
            self._seconds += 0.2 * (time.monotonic() - started - self._seconds)

    def cancel(self, job_id: str) -> bool:
        """Gives up every job of this id, which ends with `Failed(JobCancelledError)`. False: there is none."""
        with self._lock:
            chosen = [(key, ticket) for key, ticket in self._tickets.items() if ticket.job.id == job_id]
        for key, ticket in chosen:
            ticket.post(Failed(JobCancelledError("the request was cancelled")))
            self._withdraw(key, finished=False)
        return bool(chosen)

    def close(self) -> None:
        """Gives up every job and ends the process."""
        self._closed.set()
        with self._lock:
            tickets = list(self._tickets.values())
            self._unavailable = "the engine is closing"
            self._send(lambda: packed(Close()))
        for ticket in tickets:
            ticket.post(Failed(EngineUnavailableError("the engine is closing")))
        if self._process is not None:
            self._process.join(_GRACE)
            self._process.kill()
        self._readers.shutdown(wait=False, cancel_futures=True)
        if self._supervisor.is_alive():
            self._supervisor.join(_GRACE)  # it reads from the connection until the process is gone
        if self._outbox is not None:
            self._outbox.close()

    def _admit(self, ticket: Ticket) -> str:
        """Gives a job its place; the key it goes by.

        Raises:
            EngineBusyError, EngineUnavailableError: there is none.
        """
        with self._lock:
            if self._card is None or self._unavailable:
                raise EngineUnavailableError(self._unavailable)
            if len(self._tickets) >= self._card.concurrency + self._max_queue:
                raise EngineBusyError(f"{self._max_queue} requests are waiting already", self._wait())
            audio = sum(other.audio_bytes for other in self._tickets.values())
            if audio and ticket.audio_bytes > max(0, self._audio_budget - audio):
                raise EngineBusyError(
                    f"other requests hold {audio / 2**20:.1f} MiB of audio, this one brings "
                    f"{ticket.audio_bytes / 2**20:.1f} MiB, and there is room for {self._audio_budget / 2**20:g} MiB "
                    "(`audio_budget`)",
                    self._wait(),
                )
            key = str(next(self._keys))
            self._tickets[key] = ticket
        return key

    def _wait(self) -> int:
        """Seconds after which there may be room again."""
        concurrency = 1 if self._card is None else self._card.concurrency
        return max(1, math.ceil(min(self._seconds * (1 + self._max_queue / concurrency), 60.0)))

    def _read_audio(self, key: str, ticket: Ticket) -> None:
        """Reads a job's audio, in a thread."""
        audio, ticket.audio = ticket.audio, None
        if audio is None:
            return  # the job was given up
        try:
            self._complete(key, ticket, audio.added_to(ticket.job.clip, lambda: not ticket.given_up))
        except Exception as error:
            if not isinstance(error, RequestError) and not ticket.given_up:
                logger.error("the audio of request %s could not be read", ticket.job.id, exc_info=error)
            # The frames it has come through hold what was decoded.
            error.__cause__ = error.__context__ = None
            ticket.post(Failed(error.with_traceback(None)))
        del audio
        give_memory_back()

    def _complete(self, key: str, ticket: Ticket, clip: Clip) -> None:
        """Submits a job that has its whole clip now, if it has not been given up."""
        message = packed(replace(ticket.job, id=key, clip=clip, arrival=int(key)))
        with self._lock:
            if key in self._tickets:
                ticket.message = message
                ticket.audio_bytes = min(ticket.audio_bytes, len(message))  # until now, the most it could become
                self._submit()

    def _submit(self) -> None:
        """Gives the process every job that is complete and may run now."""
        if self._outbox is None:
            return  # the next process gets them
        for key, ticket in self._tickets.items():
            if ticket.message is not None and not ticket.sent and self._suspicion.may_run(key):
                ticket.sent = True
                self._outbox.put(ticket.read_message)

    def _withdraw(self, key: str, finished: bool) -> None:
        with self._lock:
            known = self._tickets.pop(key, None)
            if known is None:
                return
            known.let_go()
            if not finished and known.sent:
                self._send(lambda: packed(Cancel(key)))
            self._submit()

    def _send(self, message: Message) -> None:
        # A broken pipe is the supervisor's business: it submits every job again.
        with self._lock:
            if self._outbox is not None:
                self._outbox.put(message)

    def _spawn(self) -> None:
        """Starts a process, waits until its model is loaded, and gives it all jobs there are."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=run, args=(theirs, self._spec), name="engine", daemon=True)
        process.start()
        theirs.close()
        try:
            _, first = receive(ours)
        except (EOFError, OSError) as error:
            _end(process)
            raise EngineUnavailableError(
                f"the engine's process ended while it loaded the model ({_ending(process)})"
            ) from error
        if isinstance(first, LoadFailed):
            _end(process)
            raise EngineUnavailableError(f"the model could not be loaded: {first.message}\n{first.traceback}")
        assert isinstance(first, Ready)
        with self._lock:
            self._process, self._connection, self._card, self._unavailable = process, ours, first.card, ""
            self._outbox = Outbox(ours, process.kill)
            self._submit()

    def _supervise(self) -> None:
        while not self._closed.is_set():
            self._forward_events()
            if self._closed.is_set():
                return
            self._restarts += 1
            self._load = Load(0, 0.0)
            self._after_death()
            pause = _FIRST_PAUSE
            while not self._closed.is_set():
                try:
                    self._spawn()
                    break
                except Exception as problem:  # whatever it is, memory that is short for one: it may pass
                    error = problem
                    if not isinstance(error, EngineUnavailableError):
                        error = EngineUnavailableError(f"{type(problem).__name__}: {problem}")
                    logger.error("the engine cannot be started again: %s", error)
                    if pause > _FIRST_PAUSE:  # what waits is not given up at the first failure
                        self._fail_all(error)
                    self._closed.wait(pause)
                    pause = min(2 * pause, _LONGEST_PAUSE)

    def _forward_events(self) -> None:
        """Hands events to their tickets until the process is gone."""
        connection = self._connection
        while connection is not None:
            try:
                key, event = receive(connection)
            except (EOFError, OSError):
                return
            except Exception:
                logger.exception("the engine says what nobody understands; it is started again")
                return
            if isinstance(event, Load):
                self._load = event
                continue
            with self._lock:
                ticket = self._tickets.get(key)
            if ticket is not None:
                ticket.preparing = isinstance(event, Preparing) or (
                    ticket.preparing and not isinstance(event, Prepared)
                )
                ticket.started |= isinstance(event, Started)
                ticket.heard |= isinstance(event, Audio)
                ticket.post(event)
            del ticket, event  # or the last job's audio would stay

    def _after_death(self) -> None:
        """Ends the jobs that cannot be retried, and readies the others for the next process."""
        with self._lock:
            process, outbox, self._connection, self._outbox = self._process, self._outbox, None, None
        if process is not None:
            process.kill()  # it may only have closed its pipe
            process.join(_GRACE)
            logger.error(
                "the engine's process died (%s); %d requests are in flight", _ending(process), len(self._tickets)
            )
        if outbox is not None:
            outbox.close()
        with self._lock:
            for key, ticket in list(self._tickets.items()):
                if ticket.job.stream and ticket.heard:
                    self._fail(key, ticket, EngineDiedError("the engine died while this stream was under way"))
            if culprit := self._suspicion.after_death():
                error = EngineDiedError("the engine died each time it ran this request, the last time it ran it alone")
                self._fail(culprit, self._tickets[culprit], error)
            for ticket in self._tickets.values():
                if ticket.at_work:
                    ticket.post(Restarted())
                ticket.sent = ticket.preparing = ticket.started = ticket.heard = False

    def _fail_all(self, error: EngineUnavailableError) -> None:
        with self._lock:
            self._unavailable = str(error).splitlines()[0]
            tickets = list(self._tickets.items())
        for key, ticket in tickets:
            self._fail(key, ticket, EngineUnavailableError(self._unavailable))

    def _fail(self, key: str, ticket: Ticket, error: Exception) -> None:
        with self._lock:
            self._tickets.pop(key, None)
            ticket.let_go()
        ticket.post(Failed(error))


def _end(process: SpawnProcess) -> None:
    """Waits for a process that should leave by itself, and sees to it."""
    process.join(_GRACE)
    if process.is_alive():
        process.kill()
        process.join()


def _ending(process: SpawnProcess) -> str:
    code = process.exitcode
    if code is None:
        return "it does not end"
    if code == -signal.SIGKILL:
        return "signal 9, which the system sends when memory runs out"
    return f"signal {-code}" if code < 0 else f"exit status {code}"
