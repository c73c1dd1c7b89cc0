"""The engine as the worker sees it: jobs go in, events come out, and a death of the engine's process is survived."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import math
import multiprocessing
import signal
import threading
import time
from collections.abc import AsyncGenerator
from dataclasses import replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess

from handler.engine.messages import (
    Audio,
    Cancel,
    Card,
    Close,
    Command,
    DeadlineExceededError,
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
    receive,
    send,
)
from handler.engine.process import ModelSpec, run

logger = logging.getLogger(__name__)

_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0  # seconds between two tries to load the model again
_GRACE = 5.0  # seconds the process has to leave by itself when the engine is closed


class Engine:
    """Turns jobs into events, in a process of its own.

    `generate` may be iterated from any asyncio loop. When the process dies, another is started: what waited goes on
    waiting; what ran is run again (it is deterministic), unless audio of a stream has already left. Any of what ran may
    be the cause, so of those only one at a time is run again, beside whatever else comes; should the process die once
    more, it is run alone, and given up if the process dies of that: so nobody is given up for another.

    Args:
        spec: what the process loads.
        max_queue: how many jobs may wait besides those that run.
    """

    def __init__(self, spec: ModelSpec, max_queue: int) -> None:
        self._spec = spec
        self._max_queue = max_queue
        self._lock = threading.RLock()
        self._keys = itertools.count()
        self._tickets: dict[str, _Ticket] = {}
        self._connection: Connection | None = None
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

    async def generate(self, job: Job) -> AsyncGenerator[Event, None]:
        """Queues a job and gives its events, the last of which is `Done` or `Failed`.

        Leaving the iteration early gives the job up: its rows are free at the next decode step.
        """
        ticket = _Ticket(job, asyncio.get_running_loop())
        try:
            # In a thread: a job with much audio takes a while to go through the pipe.
            key = await asyncio.to_thread(self._admit, ticket)
        except (EngineBusyError, EngineUnavailableError) as error:
            yield Failed(error)
            return
        started = time.monotonic()
        event: Event = Started()
        try:
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
            self._send(Close())
        for ticket in tickets:
            ticket.post(Failed(EngineUnavailableError("the engine is closing")))
        if self._process is not None:
            self._process.join(_GRACE)
            self._process.kill()

    def _admit(self, ticket: _Ticket) -> str:
        with self._lock:
            self.require_place()
            key = str(next(self._keys))
            self._tickets[key] = ticket
            # Under the same lock, or a process that starts just now would be given the job twice.
            try:
                self._submit(key, ticket)
            except BaseException:
                del self._tickets[key]
                raise
        return key

    def require_place(self) -> None:
        """Whether a job that came now would be queued; asked before work is put into one.

        Raises:
            EngineBusyError, EngineUnavailableError: it would not.
        """
        with self._lock:
            if self._card is None or self._unavailable:
                raise EngineUnavailableError(self._unavailable)
            if len(self._tickets) >= self._card.concurrency + self._max_queue:
                wait = self._seconds * (1 + self._max_queue / self._card.concurrency)
                raise EngineBusyError(self._max_queue, max(1, math.ceil(min(wait, 60.0))))

    def _submit(self, key: str, ticket: _Ticket) -> None:
        """Gives a job to the process, or holds it back; see `_Ticket`."""
        beside = [other for other in self._tickets.values() if other is not ticket and not other.held]
        if ticket.alone:
            ticket.held = bool(beside)
        else:
            suspect = ticket.deaths > 0
            ticket.held = any(other.alone or (suspect and other.deaths > 0) for other in beside)
        if not ticket.held:
            self._send(replace(ticket.job, id=key, arrival=int(key)))

    def _submit_held(self) -> None:
        """Gives the process what no longer has to be held back; those that run alone go first."""
        for key, ticket in sorted(self._tickets.items(), key=lambda item: not item[1].alone):
            if ticket.held:
                self._submit(key, ticket)

    def _withdraw(self, key: str, finished: bool) -> None:
        with self._lock:
            known = self._tickets.pop(key, None)
            if known is None:
                return
            if not finished:
                self._send(Cancel(key))
            self._submit_held()

    def _send(self, command: Command) -> None:
        # A broken pipe is the supervisor's business: it submits every ticket again.
        with self._lock, contextlib.suppress(OSError, ValueError):
            if self._connection is not None:
                send(self._connection, command)

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
            for ticket in self._tickets.values():
                ticket.held = True
            self._submit_held()

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

    def _after_death(self) -> None:
        """Decides for each job what a death of the process means to it."""
        with self._lock:
            process, connection, self._connection = self._process, self._connection, None
            tickets = list(self._tickets.items())
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()  # it may only have closed its pipe
            process.join(_GRACE)
            logger.error("the engine's process died (%s); %d requests are with it", _ending(process), len(tickets))
        suspects = [(key, ticket) for key, ticket in tickets if ticket.preparing or ticket.started]
        # With none at work it died of taking one in, and that can have been any it was given.
        suspects = suspects or [(key, ticket) for key, ticket in tickets if not ticket.held]
        for key, ticket in suspects:
            ticket.deaths += 1
            if ticket.job.stream and ticket.heard:
                self._fail(key, ticket, EngineDiedError("the engine died while this stream was under way"))
            elif ticket.deaths > 1 and len(suspects) == 1:
                self._fail(key, ticket, EngineDiedError("the engine died twice on this request"))
            else:
                ticket.alone = ticket.deaths > 1
                ticket.preparing = ticket.started = ticket.heard = False
                ticket.post(Restarted())

    def _fail_all(self, error: EngineUnavailableError) -> None:
        with self._lock:
            self._unavailable = str(error).splitlines()[0]
            tickets = list(self._tickets.items())
        for key, ticket in tickets:
            self._fail(key, ticket, EngineUnavailableError(self._unavailable))

    def _fail(self, key: str, ticket: _Ticket, error: Exception) -> None:
        with self._lock:
            self._tickets.pop(key, None)
        ticket.post(Failed(error))


class _Ticket:
    """A job under way: the supervisor's end (`post`) and the client's (`next_event`).

    Attributes:
        held: it is not with the process, for another job that may kill it is.
        alone: it was there at two deaths, and must be with the process alone.
        preparing: the process encodes what it is conditioned on, and so may die of it.
        started: the process has begun with its music.
        heard: audio of it has come out.
        deaths: how often the process died while it may have died of it.
    """

    def __init__(self, job: Job, loop: asyncio.AbstractEventLoop) -> None:
        self.job = job
        self.held = self.alone = self.preparing = self.started = self.heard = False
        self.deaths = 0
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    def post(self, event: Event) -> None:
        # A closed loop raises; it has nobody left to tell.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def next_event(self) -> Event:
        left = None if math.isinf(self.job.deadline) else max(0.0, self.job.deadline - time.monotonic())
        try:
            async with asyncio.timeout(left):
                return await self._events.get()
        except TimeoutError:
            return Failed(
                DeadlineExceededError("the request was given up: its timeout passed before the clip was finished")
            )


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
