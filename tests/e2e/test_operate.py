"""A running server upgraded, scaled and stopped, with clients that go on asking."""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import requests
import torch

from archive_scripts.__main__ import main
from archive_scripts.management import Management
from archive_scripts.pack import pack
from archive_scripts.run_folder import RunFolder, find_server
from archive_scripts.workload import Workload
from tests.e2e.conftest import GOLDENS, Server, free_ports

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
CLIENTS = 3
LONG = 50
"""Seconds of a clip that takes seconds to make."""
LONG_BYTES = 2 * 32_000 * LONG


class Traffic:
    """Clients that ask for one clip after the other.

    Attributes:
        statuses: of the replies.
        problems: what came instead of a whole reply of status 200.
    """

    def __init__(self, url: str, token: dict[str, str]) -> None:
        self._url, self._token = url, token
        self._stop = threading.Event()
        self._seeds = itertools.count()
        self._threads = [threading.Thread(target=self._ask) for _ in range(CLIENTS)]
        self.statuses: Counter[int] = Counter()
        self.problems: list[str] = []

    def wait_for(self, replies: int) -> None:
        """Until so many more replies have come."""
        wanted = self.statuses.total() + replies
        while self.statuses.total() < wanted:
            time.sleep(0.02)

    def _ask(self) -> None:
        with requests.Session() as session:
            while not self._stop.is_set():
                seed = next(self._seeds)
                body = {"prompt": "80s pop", "duration": 0.5, "seed": seed, "format": "pcm"}
                try:
                    reply = session.post(self._url, json=body, headers=self._token, timeout=60)
                except requests.RequestException as error:
                    self.problems.append(repr(error))
                    continue
                self.statuses[reply.status_code] += 1
                if reply.status_code != 200 or len(reply.content) != 2 * 16_000 or reply.headers["x-seed"] != str(seed):
                    self.problems.append(f"{reply.status_code} {reply.text[:200]}")

    def __enter__(self) -> Traffic:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The versions 1.0 and 2.0 of a variant."""
    folder = tmp_path_factory.mktemp("songs")
    return [
        pack(str(GOLDENS / "text_mono"), "song", folder / version, version, GOLDENS / "hub", archive_format=form)
        for version, form in (("1.0", "zip-store"), ("2.0", "no-archive"))
    ]


def operate(server: Server, *arguments: str) -> None:
    assert main([*arguments, "--port", str(server.torchserve.running.port)]) == 0


@pytest.mark.load
def test_a_version_replaces_another_under_load_and_a_worker_goes_without_one_failed_request(
    server: Server, songs: list[Path]
) -> None:
    operate(server, "register", str(songs[0]))
    with Traffic(server.url("song"), {}) as traffic:
        traffic.wait_for(5)
        operate(server, "register", str(songs[1]), "--workers", "2")
        traffic.wait_for(5)
        operate(server, "set-default", "song", "2.0")
        operate(server, "unregister", "song", "1.0")
        assert requests.get(server.url("song", "/1.0"), timeout=60).status_code == 404
        traffic.wait_for(5)
    assert traffic.problems == []
    assert traffic.statuses[200] > 15

    with ThreadPoolExecutor(4) as pool:
        accepted = [pool.submit(server.post, "song", duration=LONG, seed=1, format="pcm") for _ in range(4)]
        in_flight(server.torchserve.running, 4)
        operate(server, "scale", "song", "1")
        operate(server, "unregister", "song")
        assert [(reply.result().status_code, len(reply.result().content)) for reply in accepted] == [
            (200, LONG_BYTES)
        ] * 4
    assert server.post("song").status_code == 404


def test_a_model_with_one_weight_that_is_no_number_is_refused_by_verify_and_when_it_is_registered(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint = Path(shutil.copytree(GOLDENS / "text_mono", tmp_path / "sick"))
    package = torch.load(checkpoint / "state_dict.bin", weights_only=True)
    package["best_state"]["transformer.layers.1.linear2.weight"][3, 4] = torch.nan
    torch.save(package, checkpoint / "state_dict.bin")
    archive = pack(str(checkpoint), "sick", tmp_path / "store", hub_dir=GOLDENS / "hub")
    cause = "state_dict.bin: 'transformer.layers.1.linear2.weight' holds NaN"
    assert main(["verify", str(archive)]) == 1
    assert cause in capsys.readouterr().out
    assert main(["register", str(archive), "--port", str(server.torchserve.running.port)]) != 0
    assert cause in capsys.readouterr().err
    assert server.post("sick").status_code == 404


def in_flight(server: RunFolder, requests: int) -> None:
    """Returns when so many are."""
    while Workload(server).in_flight(Management(server).versions("song")) < requests:
        time.sleep(0.02)


@contextmanager
def serving(folder: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "archive_scripts", "serve", *arguments, "--port", str(port)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(folder)}
    process = subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.terminate()
        process.communicate(timeout=60)


def test_when_its_terminal_is_closed_what_was_accepted_is_finished_and_nothing_stays(
    songs: list[Path], tmp_path: Path
) -> None:
    port = free_ports(3)
    command = [sys.executable, "-m", "archive_scripts", "serve", str(songs[0]), "--port", str(port), "--drain", "60"]
    terminal, inside = os.openpty()
    process = subprocess.Popen(
        ["setsid", "--ctty", "--wait", *command],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=inside,
        stdout=inside,
        stderr=inside,
    )
    os.close(inside)
    try:
        seen = b""
        while b"Ctrl-C stops" not in seen:
            seen += os.read(terminal, 4096)
        server = find_server(port)
        started = psutil.Process(process.pid).children(recursive=True)
        url, token = f"http://127.0.0.1:{port}/predictions/song", server.authorization("inference")
        body = {"duration": LONG, "format": "pcm"}
        with ThreadPoolExecutor(1) as pool:
            accepted = pool.submit(lambda: requests.post(url, json=body, headers=token, timeout=120))
            in_flight(server, 1)
            os.close(terminal)
            reply = accepted.result()
        assert (reply.status_code, len(reply.content)) == (200, LONG_BYTES)
        assert not psutil.wait_procs(started, timeout=30)[1]
        process.wait(timeout=30)
        assert not server.path.exists()
    finally:
        process.terminate()
        process.wait(timeout=60)


def test_on_a_stop_signal_what_was_accepted_is_finished_and_what_is_new_refused(
    songs: list[Path], tmp_path: Path
) -> None:
    port = free_ports(3)
    url = f"http://127.0.0.1:{port}/predictions/song"
    with serving(tmp_path, port, str(songs[0]), "--workers", "2", "--device", "cpu", "--drain", "60") as process:
        assert process.stdout is not None
        seen = list(itertools.takewhile(lambda line: not line.startswith("Ctrl-C stops"), process.stdout))
        assert any(line.startswith("song: loaded by 2 workers") for line in seen), "".join(seen)
        server = find_server(port)
        workers = [worker.pid for worker in Management(server).version("song").workers]
        share = str(max(1, len(os.sched_getaffinity(0)) // 2))
        assert [psutil.Process(pid).environ()["OMP_NUM_THREADS"] for pid in workers] == [share, share]

        inference, management = server.authorization("inference"), server.authorization("management")
        for token, status in (({}, 400), (inference, 400), (management, 404)):
            models = f"http://127.0.0.1:{port + 1}/models"
            assert requests.post(models, params={"url": "no.mar"}, headers=token, timeout=60).status_code == status
            assert requests.delete(f"{models}/no", headers=token, timeout=60).status_code == status

        def ask(seconds: float) -> requests.Response:
            return requests.post(url, json={"duration": seconds, "format": "pcm"}, headers=inference, timeout=120)

        with ThreadPoolExecutor(4) as pool:
            accepted = [pool.submit(ask, LONG) for _ in range(4)]
            in_flight(server, 4)
            process.send_signal(signal.SIGTERM)
            while (refused := ask(0.1)).status_code == 200:
                time.sleep(0.02)
        assert (refused.status_code, refused.json()["error"]["type"]) == (503, "unavailable")
        assert [(reply.result().status_code, len(reply.result().content)) for reply in accepted] == [
            (200, LONG_BYTES)
        ] * 4
        assert process.wait(timeout=60) == 0
        assert not server.path.exists()
