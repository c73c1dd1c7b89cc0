"""A turn that hangs is ended; turns that take their time are not."""

from __future__ import annotations

import threading
import time

from handler.engine.watchdog import Watchdog


def test_a_turn_that_outlasts_the_patience_is_ended() -> None:
    ended = threading.Event()
    with Watchdog(1.0, ended.set).turn():
        assert ended.wait(30)


def test_short_turns_and_idle_times_are_not_ended_however_many() -> None:
    ended = threading.Event()
    watchdog = Watchdog(1.5, ended.set)
    for _ in range(6):
        with watchdog.turn():
            time.sleep(0.4)
    time.sleep(2.5)
    assert not ended.is_set()
