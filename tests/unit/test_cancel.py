"""A cancel finds its request in whichever worker has it."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from handler.cancel import CancelBoard

OTHER_WORKER = """
import sys, tempfile
tempfile.tempdir = sys.argv[1]
from handler.cancel import CancelBoard
board = CancelBoard("debug/1.0", lambda request_id: request_id == "theirs")
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture(autouse=True)
def _private_folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("t")))


@pytest.fixture
def board() -> Iterator[CancelBoard]:
    board = CancelBoard("debug/1.0", lambda request_id: request_id == "mine")
    yield board
    board.close()


def test_a_request_of_another_worker_is_found(board: CancelBoard) -> None:
    other = subprocess.Popen(
        [sys.executable, "-c", OTHER_WORKER, tempfile.gettempdir()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
        text=True,
    )
    try:
        assert other.stdout is not None
        assert other.stdout.readline() == "ready\n"
        assert board.cancel("mine") == 1
        assert board.cancel("theirs") == 1
        assert board.cancel("nobody's") == 0
    finally:
        other.kill()
        other.communicate()
    # A killed worker leaves its socket behind; nobody waits for it.
    assert board.cancel("theirs") == 0
    assert board.cancel("mine") == 1


def test_a_worker_that_hangs_does_not_keep_others_from_being_asked(
    board: CancelBoard, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.cancel._PATIENCE", 0.05)
    [folder] = Path(tempfile.gettempdir()).iterdir()
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as deaf,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s,
    ):
        deaf.bind(str(folder / "0.worker"))
        s.setblocking(False)
        with contextlib.suppress(BlockingIOError):  # its queue is full
            while True:
                s.sendto(b"x", str(folder / "0.worker"))
        assert board.cancel("mine") == 1


def test_a_folder_too_long_for_a_socket_is_refused_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / ("x" * 100)
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    with pytest.raises(OSError, match=r"too long a path for a socket; set TMPDIR to a shorter one"):
        CancelBoard("debug/1.0", lambda request_id: True)


def test_a_folder_of_somebody_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("handler.cancel.os.getuid", lambda: 4_000_000)
    with pytest.raises(PermissionError, match="set TMPDIR to a folder of your own"):
        CancelBoard("debug/1.0", lambda request_id: True)


def test_another_variant_hears_nothing(board: CancelBoard) -> None:
    other = CancelBoard("small/1.0", lambda request_id: True)
    try:
        assert board.cancel("anything") == 0
    finally:
        other.close()
