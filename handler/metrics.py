"""What a worker reports to Prometheus, through TorchServe's metrics address; `metrics.yaml` declares each."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from typing import Literal, Protocol

from handler.engine.messages import Audio, Done, Event, Started, Status

Kind = Literal["counter", "gauge", "histogram"]


class Sink(Protocol):
    """Where measurements go."""

    def __call__(self, name: str, kind: Kind, value: float, labels: list[str]) -> None: ...


class Metrics:
    """The measurements of one worker.

    Args:
        sink: where they go.
        model, worker: what they are labelled with.
    """

    def __init__(self, sink: Sink, model: str, worker: str) -> None:
        self._sink = sink
        self._labels = [model, worker]
        self._restarts = 0
        self._in_flight = 0

    def request(self, outcome: str) -> None:
        """A request was answered: `ok`, or the type of its error."""
        self._sink("musicgen_requests_total", "counter", 1, [*self._labels, outcome])

    @contextmanager
    def in_flight(self) -> Iterator[None]:
        """Counts a request from its arrival until its reply has gone out, and reports it at once: whoever drains this
        worker waits for 0."""
        self._in_flight += 1
        self._report("musicgen_requests_in_flight", "gauge", self._in_flight)
        try:
            yield
        finally:
            self._in_flight -= 1
            self._report("musicgen_requests_in_flight", "gauge", self._in_flight)

    async def timed(self, events: AsyncIterator[Event], audio_seconds: float) -> AsyncGenerator[Event, None]:
        """The events of a request that has just come, passed on; the times between them are measured.

        Args:
            events: of the request's job.
            audio_seconds: of its clip.
        """
        came = started = time.monotonic()
        waiting, heard = True, False
        async for event in events:
            match event:
                case Started() if waiting:  # after a Restarted it comes again
                    waiting = False
                    started = time.monotonic()
                    self._report("musicgen_queue_wait_seconds", "histogram", started - came)
                case Audio() if not heard:
                    heard = True
                    self._report("musicgen_first_audio_seconds", "histogram", time.monotonic() - came)
                case Done():
                    took = max(time.monotonic() - started, 1e-9)
                    self._report("musicgen_audio_seconds_total", "counter", audio_seconds)
                    self._report("musicgen_real_time_factor", "histogram", audio_seconds / took)
            yield event

    def status(self, status: Status) -> None:
        """What the engine is doing now."""
        self._report("musicgen_queue_depth", "gauge", status.waiting)
        self._report("musicgen_running_requests", "gauge", status.running)
        self._report("musicgen_active_rows", "gauge", status.rows)
        self._report("musicgen_steps_per_second", "gauge", status.steps_per_second)
        if status.restarts > self._restarts:
            self._report("musicgen_engine_restarts_total", "counter", status.restarts - self._restarts)
            self._restarts = status.restarts

    def watch(self, status: Callable[[], Status], seconds: float = 2.0) -> None:
        """Reports the status every so often, for as long as the worker lives, when it has changed."""

        def loop() -> None:
            last = None
            while not stopped.wait(seconds):
                now = status()
                if now != last:
                    self.status(now)
                last = now

        stopped = threading.Event()
        threading.Thread(target=loop, name="metrics", daemon=True).start()

    def _report(self, name: str, kind: Kind, value: float) -> None:
        self._sink(name, kind, value, self._labels)
