"""What goes to the engine's process: nobody waits for it, and what is no longer wanted is neither sent nor kept."""

from __future__ import annotations

import gc
import multiprocessing
import pickle
import threading
import time
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection

import pytest

from handler.engine.messages import Cancel, packed, receive
from handler.engine.outbox import Outbox


def never() -> None:
    raise AssertionError


@pytest.fixture
def pipe() -> tuple[Connection, Connection]:
    return multiprocessing.Pipe()


def eventually(check: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not check():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_messages_arrive_in_their_order_and_nobody_waits_for_a_long_one(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe
    outbox = Outbox(ours, never)
    outbox.put(lambda: packed(bytes(10_000_000)))  # more than a pipe holds
    outbox.put(lambda: packed(Cancel("1")))
    assert receive(theirs) == bytes(10_000_000)
    assert receive(theirs) == Cancel("1")


def test_what_is_no_longer_wanted_when_its_turn_comes_is_not_sent(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe
    outbox = Outbox(ours, never)
    wanted: list[bytes | None] = [packed("a job")]
    outbox.put(lambda: packed(bytes(10_000_000)))
    outbox.put(lambda: wanted[0])
    outbox.put(lambda: packed("the next"))
    wanted[0] = None
    assert [len(receive(theirs)), receive(theirs)] == [10_000_000, "the next"]


class Content:
    """What a message is made of."""

    def packed(self) -> bytes:
        return packed("content")


def test_nothing_of_a_message_is_kept_once_it_is_sent(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe
    outbox = Outbox(ours, never)
    content = Content()
    known = weakref.ref(content)
    outbox.put(content.packed)
    del content
    assert receive(theirs) == "content"
    gc.disable()
    try:
        eventually(lambda: known() is None)
    finally:
        gc.enable()


@pytest.mark.parametrize("error", [MemoryError(), pickle.PicklingError()])
def test_a_message_that_cannot_be_sent_is_told_of(pipe: tuple[Connection, Connection], error: Exception) -> None:
    def broken() -> bytes:
        raise error

    failed = threading.Event()
    Outbox(pipe[0], failed.set).put(broken)
    assert failed.wait(30)


def test_a_pipe_that_broke_is_told_of_and_closed_when_nobody_reads_from_it(pipe: tuple[Connection, Connection]) -> None:
    ours, theirs = pipe
    failed = threading.Event()
    outbox = Outbox(ours, failed.set)
    theirs.close()
    outbox.put(lambda: packed("a job"))
    assert failed.wait(30)
    assert not ours.closed
    outbox.close()
    eventually(lambda: ours.closed)
