"""A real TorchServe, with archives of a tiny model, for all end-to-end tests."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import psutil
import pytest
import requests

from archive_scripts.machine import is_taken
from archive_scripts.pack import pack
from archive_scripts.server import TorchServe

GOLDENS = Path(__file__).parents[1] / "goldens"
STARTUP_SECONDS = 120
TIMEOUT = 120
PATIENCE = 60

POISON = '''

import os
import signal

_sound_start = MusicGen.start


def _poisoned_start(self: MusicGen, clip: Clip, params: GenerationParams) -> Generation:
    """Misbehaves for some prompts."""

    def die(*_: object) -> Tensor:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError

    def fail(*_: object) -> Tensor:
        raise ArithmeticError("poisoned")

    match clip.description:
        case "raise":
            raise ArithmeticError("poisoned")
        case "die early":
            die()
    generation = _sound_start(self, clip, params)
    match clip.description:
        case "die":
            generation.read = die
        case "raise late":
            generation.read = fail
    return generation


MusicGen.start = _poisoned_start
'''
"""Added to the `handler/musicgen.py` of an archive."""


class Server:
    """What a client knows of a server, where it is, and what an operator sees of it."""

    def __init__(self, torchserve: TorchServe, port: int) -> None:
        self.torchserve = torchserve
        self.management = f"http://127.0.0.1:{port + 1}"
        self.metrics = f"http://127.0.0.1:{port + 2}"

    def url(self, model: str = "tiny", path: str = "") -> str:
        return f"{self.torchserve.url}/predictions/{model}{path}"

    def queried(self, **fields: Any) -> str:
        """The address of a clip of `tiny`, with its fields in the query."""
        return f"{self.torchserve.url}/tiny/predict?{urlencode(fields)}"

    def post(self, model: str = "tiny", request_id: str | None = None, /, **fields: Any) -> requests.Response:
        headers = {} if request_id is None else {"x-request-id": request_id}
        return requests.post(self.url(model), json=fields, headers=headers, timeout=TIMEOUT)

    def post_together(self, *bodies: dict[str, Any], model: str = "tiny") -> list[requests.Response]:
        """All at the same time; the replies in the same order."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda fields: self.post(model, **fields), bodies))

    def stream(self, model: str = "tiny", request_id: str | None = None, /, **fields: Any) -> requests.Response:
        """A reply of which the first bytes have come, so its request is running; the rest is still to be read."""
        headers = {} if request_id is None else {"x-request-id": request_id}
        body = {"stream": True, **fields}
        return requests.post(self.url(model), json=body, headers=headers, timeout=TIMEOUT, stream=True)

    def cancel(self, request_id: str, model: str = "tiny") -> None:
        """Cancels a request that is on its way, as soon as it has arrived."""

        def cancelled() -> bool:
            reply = requests.post(self.url(model, "/1.0/cancel"), json={"id": request_id}, timeout=TIMEOUT)
            assert reply.status_code in (200, 404), reply.text
            return reply.status_code == 200

        eventually(cancelled)

    def scale(self, model: str, workers: int) -> None:
        url = f"{self.management}/models/{model}?min_worker={workers}&synchronous=true"
        assert requests.put(url, timeout=TIMEOUT).status_code == 200

    def workers(self, model: str = "tiny") -> list[psutil.Process]:
        """The processes of a model's workers, all of them ready."""
        [status] = requests.get(f"{self.management}/models/{model}", timeout=TIMEOUT).json()
        assert all(worker["status"] == "READY" for worker in status["workers"])
        return [psutil.Process(worker["pid"]) for worker in status["workers"]]

    def engine(self, model: str = "tiny") -> psutil.Process:
        """The process that holds the model, below its only worker."""
        [worker] = self.workers(model)
        [engine] = [child for child in worker.children() if any("spawn_main" in part for part in child.cmdline())]
        return engine

    def report(self) -> str:
        """What Prometheus reads."""
        return requests.get(f"{self.metrics}/metrics", timeout=TIMEOUT).text

    def measured(self, name: str, model: str = "tiny", **labels: str) -> dict[str, float]:
        """The values of a metric by worker, those with these labels."""
        values: dict[str, float] = {}
        for line in self.report().splitlines():
            if not line.startswith(f"{name}{{"):
                continue
            found = dict(re.findall(r'(\w+)="([^"]*)"', line))
            if labels.items() <= found.items() and found["ModelName"] == model:
                values[found["Worker"]] = values.get(found["Worker"], 0.0) + float(line.rpartition(" ")[2])
        return values


def eventually(check: Callable[[], bool]) -> None:
    """Returns as soon as a check holds, which must be within a minute."""
    end = time.monotonic() + PATIENCE
    while not check():
        assert time.monotonic() < end, "it never came to be"
        time.sleep(0.05)


def free_ports(count: int) -> int:
    """The first of so many free ports in a row."""
    while True:
        first = random.randrange(20_000, 30_000)
        if not any(is_taken("127.0.0.1", first + offset) for offset in range(count)):
            return first


def run_server(archives: list[Path], open_profile: bool = True) -> Iterator[Server]:
    port = free_ports(3)
    with TorchServe(archives, port, open_profile=open_profile) as torchserve:
        for archive in archives:
            torchserve.wait_until_loaded(archive.stem, STARTUP_SECONDS)
            torchserve.generate(archive.stem, {"duration": 0.1}, STARTUP_SECONDS)
        yield Server(torchserve, port)


@pytest.fixture(scope="session")
def archives(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """`tiny`, with the defaults; `narrow`, where two requests run and one may wait; and `fragile`, with POISON."""
    store = tmp_path_factory.mktemp("model-store")
    source = {"variant": str(GOLDENS / "text_mono"), "output": store, "hub_dir": GOLDENS / "hub"}
    narrow = {"max_concurrency": 2, "max_queue": 1}
    fragile = pack(**source, name="fragile", archive_format="no-archive")  # type: ignore[arg-type]
    with (fragile / "handler" / "musicgen.py").open("a", encoding="utf-8") as code:
        code.write(POISON)
    return [
        pack(**source, name="tiny"),  # type: ignore[arg-type]
        pack(**source, name="narrow", handler=narrow),  # type: ignore[arg-type]
        fragile,
    ]


@pytest.fixture(scope="session")
def server(archives: list[Path]) -> Iterator[Server]:
    yield from run_server(archives)
