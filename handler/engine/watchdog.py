"""Ends a process that hangs, so that another can take its place."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import Thread

_TICK = 0.5  # seconds


class Watchdog:
    """Sees to it that no turn takes for ever, as one does whose kernel never ends.

    The time a turn takes is counted in ticks of this thread: what stops the whole process, or the machine, stops them.

    Args:
        patience: seconds that a turn may take.
        end: ends the process; called once, from a thread of its own.
    """

    def __init__(self, patience: float, end: Callable[[], object]) -> None:
        self._ticks = patience / _TICK
        self._end = end
        self._turn: object = None  # the one under way
        Thread(target=self._watch, name="watchdog", daemon=True).start()

    @contextmanager
    def turn(self) -> Iterator[None]:
        """What is done inside is one turn."""
        self._turn = object()
        try:
            yield
        finally:
            self._turn = None

    def _watch(self) -> None:
        seen, ticks = self._turn, 0
        while ticks < self._ticks:
            time.sleep(_TICK)
            turn = self._turn
            ticks = ticks + 1 if turn is not None and turn is seen else 0
            seen = turn
        self._end()
