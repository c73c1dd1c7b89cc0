"""What dies, fills up or misbehaves around a server, with real processes: what was accepted is answered, whoever can
be told is told, and the server serves again. Faults of the engine are in test_engine.py, of streams in
test_streaming.py, of a stop under load in test_operate.py, of a whole machine in test_two_servers.py."""

from __future__ import annotations

import itertools
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import requests

from archive_scripts.__main__ import main
from archive_scripts.errors import CommandError
from archive_scripts.management import Management
from archive_scripts.pack import pack
from archive_scripts.server import TorchServe
from tests.e2e.conftest import GOLDENS, STARTUP_SECONDS, TIMEOUT, Server, eventually, free_ports, run_server

ROOT = Path(__file__).resolve().parents[2]
SHORT: dict[str, Any] = {"prompt": "80s pop", "duration": 0.4, "seed": 1}
LONG: dict[str, Any] = {"prompt": "80s pop", "duration": 20, "seed": 2}

pytestmark = pytest.mark.faults
own_server = contextmanager(run_server)


@pytest.fixture(scope="module")
def expected(server: Server) -> bytes:
    """The clip of SHORT, as a server makes it to which nothing has happened."""
    return server.post(**SHORT).content


# ---- processes that are killed


def test_a_killed_worker_takes_its_engine_along_and_another_serves_in_its_place(
    archives: list[Path], expected: bytes
) -> None:
    # Requests that are in flight then hang until their client gives up: TorchServe forgets them.
    with own_server(archives[:1]) as server:
        [worker], engine = server.workers(), server.engine()
        worker.kill()
        assert not psutil.wait_procs([engine], timeout=TIMEOUT)[1]
        management = Management(server.torchserve.running)
        eventually(lambda: [w.pid for w in management.version("tiny").workers if w.is_ready] not in ([], [worker.pid]))
        assert server.post(**SHORT).content == expected
        assert main(["scale", "tiny", "2", "--port", str(server.torchserve.running.port)]) == 0
        assert server.post(**SHORT).content == expected


def test_when_java_is_killed_serve_says_so_leaves_nothing_and_can_be_started_again(
    archives: list[Path], tmp_path: Path, expected: bytes
) -> None:
    port = free_ports(3)
    command = [sys.executable, "-m", "archive_scripts", "serve", str(archives[0]), "--port", str(port), "--open"]

    @contextmanager
    def serving() -> Iterator[subprocess.Popen[str]]:
        pipe = subprocess.PIPE
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=pipe, stderr=pipe, text=True)
        assert process.stdout is not None
        seen = list(itertools.takewhile(lambda line: not line.startswith("Ctrl-C stops"), process.stdout))
        assert "ready; try\n" in seen
        try:
            yield process
        finally:
            process.terminate()
            process.wait(TIMEOUT)

    def ask(**fields: Any) -> requests.Response:
        url = f"http://127.0.0.1:{port}/predictions/tiny"
        return requests.post(url, json=fields, timeout=TIMEOUT, stream=True)

    with serving() as process:
        family = psutil.Process(process.pid).children(recursive=True)
        [java] = [child for child in family if child.name() == "java"]
        stream = ask(**LONG, stream=True, format="pcm")
        assert stream.status_code == 200
        java.kill()
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            _ = stream.content
        _, told = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 2
        assert "TorchServe ended by itself" in told
        assert not psutil.wait_procs(family, timeout=TIMEOUT)[1]
    with serving():
        assert ask(**SHORT).content == expected


# ---- a disk that is full


@pytest.fixture
def small_disk() -> Iterator[Path]:
    """A file system of its own, at a path short enough for sockets."""
    folder = tempfile.mkdtemp()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "musicgen", folder], capture_output=True)
    if mounted.returncode:
        os.rmdir(folder)
        pytest.skip(f"only root can mount a small disk: {mounted.stderr.decode().strip()}")
    try:
        yield Path(folder)
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)
        os.rmdir(folder)


def test_a_disk_that_fills_up_while_it_serves_changes_nothing_for_clients(
    small_disk: Path, tmp_path_factory: pytest.TempPathFactory, expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = tmp_path_factory.mktemp("store")  # a folder is served where it lies
    archive = pack(str(GOLDENS / "text_mono"), "tiny", elsewhere, hub_dir=GOLDENS / "hub", archive_format="no-archive")
    monkeypatch.setattr("tempfile.tempdir", str(small_disk))
    with own_server([archive]) as server:
        assert server.torchserve.folder.is_relative_to(small_disk)
        filler = small_disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        assert shutil.disk_usage(small_disk).free == 0
        assert [reply.content for reply in server.post_together(*[SHORT] * 6)] == [expected] * 6
        with ThreadPoolExecutor() as pool:
            long = pool.submit(server.post, "tiny", "long", **{**LONG, "duration": 120})
            server.cancel("long")
            assert long.result().status_code == 499
        server.engine().kill()
        assert server.post(**SHORT).content == expected
        filler.unlink()
        assert server.post(**SHORT).content == expected


def test_a_disk_too_full_to_pack_on_is_named_and_left_as_it_was(small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(bytes(shutil.disk_usage(small_disk).free - 2**20))
    with pytest.raises(CommandError, match="free on this disk"):
        pack(str(GOLDENS / "text_mono"), "tiny", small_disk / "store", hub_dir=GOLDENS / "hub")
    assert [path.name for path in small_disk.rglob("*") if path.is_file()] == ["filler"]


# ---- a clock that jumps

JUMPING = '''
import pathlib
import time

_clock, _jump = time.time, pathlib.Path({jump!r})


def _jumping() -> float:
    """The time of day, moved by as many seconds as a file says."""
    return _clock() + (float(_jump.read_text()) if _jump.exists() else 0.0)


time.time = _jumping
'''
"""Added to the `handler/__init__.py` of an archive: the worker and the engine both import it."""


def test_a_clock_that_jumps_neither_ends_nor_holds_up_a_request(tmp_path: Path, expected: bytes) -> None:
    archive = pack(str(GOLDENS / "text_mono"), "tiny", tmp_path, hub_dir=GOLDENS / "hub", archive_format="no-archive")
    jump = tmp_path / "jump"
    with (archive / "handler" / "__init__.py").open("a", encoding="utf-8") as code:
        code.write(JUMPING.format(jump=str(jump)))
    with own_server([archive]) as server, ThreadPoolExecutor() as pool:
        for seconds in (86_400 * 365, -86_400 * 365, 0):
            long = pool.submit(server.post, **LONG, timeout=100, stream=True, format="pcm")
            eventually(lambda: sum(server.measured("musicgen_requests_in_flight").values()) == 1)
            jump.write_text(str(seconds))
            [described] = [requests.get(server.url(path="/1.0/v1/models"), timeout=TIMEOUT).json()["data"][0]]
            assert described["id"] == "tiny"
            assert server.post(**SHORT, timeout=100).content == expected
            assert len(long.result().content) == 2 * 32_000 * LONG["duration"]
            overdue = server.post(**{**LONG, "duration": 120}, timeout=0.5)
            assert (overdue.status_code, overdue.json()["error"]["type"]) == (504, "deadline_exceeded")


# ---- archives that cannot be served


def test_a_corrupt_archive_is_refused_with_its_name(archives: list[Path], tmp_path: Path) -> None:
    whole = archives[0].read_bytes()
    for name, data in {
        "short": whole[: len(whole) // 2],
        "flipped": whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
        "empty": b"",
    }.items():
        archive = tmp_path / f"{name}.mar"
        archive.write_bytes(data)
        with (
            pytest.raises(CommandError, match=name),
            TorchServe([archive], free_ports(3), open_profile=True) as server,
        ):
            server.wait_until_loaded(name, STARTUP_SECONDS)


def test_a_folder_whose_checkpoint_was_damaged_is_not_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = pack(str(GOLDENS / "text_mono"), "tiny", tmp_path, hub_dir=GOLDENS / "hub", archive_format="no-archive")
    weights = archive / "checkpoint" / "state_dict.bin"
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)
    assert main(["serve", str(archive), "--port", str(free_ports(3))]) == 2
    assert "checkpoint/state_dict.bin is damaged or was changed after packing" in capsys.readouterr().err


def test_a_model_that_its_memory_budget_cannot_hold_is_refused_with_the_numbers(tmp_path: Path) -> None:
    archive = pack(
        str(GOLDENS / "text_mono"), "tiny", tmp_path, hub_dir=GOLDENS / "hub", handler={"memory_budget": 2**20}
    )
    with (
        pytest.raises(CommandError, match=r"weights take \d+ MiB, and 1 MiB is the `memory_budget`"),
        TorchServe([archive], free_ports(3), open_profile=True) as server,
    ):
        server.wait_until_loaded("tiny", STARTUP_SECONDS)


def test_a_port_that_is_taken_is_named_and_its_server_not_disturbed(
    server: Server, archives: list[Path], expected: bytes
) -> None:
    for port in (server.torchserve.running.port, server.torchserve.running.port - 2):
        with pytest.raises(CommandError, match=f"port {server.torchserve.running.port} is taken"):
            TorchServe(archives[:1], port, open_profile=True)
    assert server.post(**SHORT).content == expected


# ---- clients that misbehave


def test_bodies_beyond_java_s_memory_are_refused_and_no_other_request_is_disturbed(
    archives: list[Path], expected: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("JAVA_TOOL_OPTIONS", "-Xmx192m")
    body = os.urandom(50_000_000)

    def flood(server: Server) -> int:
        return requests.post(server.url(), data=SHORT, files={"continuation": body}, timeout=TIMEOUT).status_code

    with own_server(archives[:1]) as server, ThreadPoolExecutor(16) as pool:
        alone = server.post(**LONG).content
        under_way = pool.submit(lambda: server.post(**LONG))
        statuses = list(pool.map(lambda _: flood(server), range(12)))
        assert 507 in statuses
        assert set(statuses) <= {400, 507}  # one that finds room is larger than an upload may be
        assert under_way.result().content == alone
        assert server.post(**SHORT).content == expected


def test_half_open_clients_hold_up_nobody_and_leave_nothing_behind(server: Server, expected: bytes) -> None:
    port = server.torchserve.running.port
    body = b'{"prompt": "80s pop", "duration": 0.4, "seed": 1}'
    head = (
        f"POST /predictions/tiny HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    )
    request = head.encode() + b"\r\n\r\n" + body
    with ExitStack() as stack:

        def client(sent: bytes) -> socket.socket:
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT))
            connection.sendall(sent)
            return connection

        _silent = [client(b"") for _ in range(20)]
        _broken_off = [client(request[:length]) for length in (10, len(head), len(request) - 1) for _ in range(10)]
        for vanishing in [client(request) for _ in range(10)]:
            # Closed with a reset, not a goodbye.
            vanishing.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            vanishing.close()
        done_sending = client(request)
        done_sending.shutdown(socket.SHUT_WR)
        assert [reply.content for reply in server.post_together(*[SHORT] * 4)] == [expected] * 4
        eventually(lambda: sum(server.measured("musicgen_requests_in_flight").values()) == 0)


# ---- more requests than it can make


@dataclass(frozen=True)
class Answer:
    """What became of a request, and how many clips of others were finished while it was there."""

    status: int
    retry_after: str | None
    others: int


@pytest.mark.parametrize("seconds", [10, pytest.param(180, marks=[pytest.mark.load, pytest.mark.timeout(600)])])
def test_of_twice_the_load_all_that_is_accepted_is_made_and_the_rest_refused_at_once(
    server: Server, seconds: float
) -> None:
    running, waiting = 2, 1  # of `narrow`
    alone = [server.post("narrow", **{**SHORT, "duration": 3, "seed": seed}).content for seed in range(4)]
    seeds, lock, finished = itertools.count(), threading.Lock(), [0]
    end = time.monotonic() + seconds

    def client() -> list[Answer]:
        answers = []
        with requests.Session() as session:
            while time.monotonic() < end:
                with lock:
                    seed, before = next(seeds) % len(alone), finished[0]
                body = {**SHORT, "duration": 3, "seed": seed}
                reply = session.post(server.url("narrow"), json=body, timeout=TIMEOUT)
                with lock:
                    others = finished[0] - before
                    finished[0] += reply.ok
                assert reply.content == alone[seed] if reply.ok else reply.json()["error"]["type"] == "busy"
                answers.append(Answer(reply.status_code, reply.headers.get("retry-after"), others))
                if not reply.ok:
                    time.sleep(0.05)  # or nothing but refusals would be measured
        return answers

    with ThreadPoolExecutor(2 * (running + waiting)) as pool:
        clients = [pool.submit(client) for _ in range(2 * (running + waiting))]
        answers = [answer for done in clients for answer in done.result()]
    accepted = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 503]
    assert len(accepted) + len(refused) == len(answers)
    assert len(accepted) > running + waiting
    assert len(refused) > running + waiting
    assert all(answer.retry_after is not None for answer in refused)
    # At once: not so many clips are finished as run together. And who is accepted waits for those before it alone.
    assert max(answer.others for answer in refused) <= running
    assert max(answer.others for answer in accepted) <= 2 * (running + waiting)
    assert server.post("narrow", **SHORT).ok
