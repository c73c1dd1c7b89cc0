from __future__ import annotations

import socket
import time
from collections.abc import Iterator
from contextlib import suppress

import pytest

from archive_scripts.workload import replies_unread, wait_until_idle


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("archive_scripts.workload.SETTLE_SECONDS", 0.05)
    monkeypatch.setattr("archive_scripts.workload.POLL_SECONDS", 0.01)


def test_idle_is_what_stays_idle() -> None:
    counts = iter([2, 0, 1, 0])
    assert wait_until_idle(lambda: next(counts, 0), 60) == 0
    assert next(counts, None) is None


def test_what_is_left_when_the_time_is_up_is_told() -> None:
    assert wait_until_idle(lambda: 4, 0.05) == 4


def test_a_reply_that_its_client_has_not_read_counts_until_it_has() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            server, _ = listener.accept()
            server.setblocking(False)
            with server:
                assert replies_unread(port) == 0
                for _ in fill(server):
                    pass
                assert replies_unread(port) == 1
                client.settimeout(0.2)
                with suppress(TimeoutError):
                    while client.recv(2**20):
                        pass
                deadline = time.monotonic() + 10
                while replies_unread(port) and time.monotonic() < deadline:
                    time.sleep(0.01)
                assert replies_unread(port) == 0


def fill(connection: socket.socket) -> Iterator[int]:
    """Writes until nothing more goes out."""
    while True:
        try:
            yield connection.send(bytes(2**20))
        except BlockingIOError:
            return
