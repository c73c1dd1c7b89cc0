"""A job under way, in the worker."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from typing import Protocol

from handler.engine.messages import DeadlineExceededError, Event, Failed, Job
from handler.params import Clip


class UnreadAudio(Protocol):
    """The audio a job needs and does not have yet."""

    @property
    def size(self) -> int:
        """Bytes it takes while it waits to be read, and those it takes then."""

    def added_to(self, clip: Clip, wanted: Callable[[], bool]) -> Clip:
        """Reads it as long as it is wanted; the clip with it.

        Raises:
            RequestError: it turns out to be no audio.
        """


class Ticket:
    """A job under way: the supervisor's end (`post`) and the client's (`next_event`).

    Attributes:
        audio: that is still to be read.
        audio_bytes: that its audio takes, read or not.
        message: the job as it goes to the process; None as long as its audio is not read, and once it is given up.
        sent: the process has it.
        preparing: the process encodes what it is conditioned on.
        started: the process has begun with its music.
        heard: audio of it has come out.
        deaths: how often the process may have died of it.
        given_up: no client waits for it any more.
    """

    def __init__(self, job: Job, audio: UnreadAudio | None, loop: asyncio.AbstractEventLoop) -> None:
        self.job = job
        self.audio = audio
        self.audio_bytes = 0 if audio is None else audio.size
        self.message: bytes | None = None
        self.sent = self.preparing = self.started = self.heard = False
        self.deaths = 0
        self.given_up = False
        self._loop = loop
        self._events: asyncio.Queue[Event] = asyncio.Queue()

    @property
    def at_work(self) -> bool:
        """The process computes something for it, and so may die of it."""
        return self.preparing or self.started

    def read_message(self) -> bytes | None:
        """The job as it goes to the process; None: it is given up."""
        return self.message

    def let_go(self) -> None:
        """Lets go of its audio: it is given up, and what still has its turn to come finds nothing."""
        self.audio = self.message = None
        self.given_up = True

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
