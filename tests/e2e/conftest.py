"""A real TorchServe, with archives of a tiny model, for all end-to-end tests."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import requests

from archive_scripts.machine import is_taken
from archive_scripts.pack import pack
from archive_scripts.server import TorchServe

GOLDENS = Path(__file__).parents[1] / "goldens"
STARTUP_SECONDS = 120


class Server:
    """What a client knows of a server: where it is."""

    def __init__(self, torchserve: TorchServe, port: int) -> None:
        self.torchserve = torchserve
        self.management = f"http://127.0.0.1:{port + 1}"
        self.metrics = f"http://127.0.0.1:{port + 2}"

    def url(self, model: str = "tiny", path: str = "") -> str:
        return f"{self.torchserve.url}/predictions/{model}{path}"

    def post(self, model: str = "tiny", **fields: Any) -> requests.Response:
        return requests.post(self.url(model), json=fields, timeout=120)

    def post_together(self, *bodies: dict[str, Any], model: str = "tiny") -> list[requests.Response]:
        """All at the same time; the replies in the same order."""
        with ThreadPoolExecutor(len(bodies)) as pool:
            return list(pool.map(lambda fields: self.post(model, **fields), bodies))


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
    """`tiny`, with the defaults, and `narrow`, where one request may wait."""
    store = tmp_path_factory.mktemp("model-store")
    source = {"variant": str(GOLDENS / "text_mono"), "output": store, "hub_dir": GOLDENS / "hub"}
    return [
        pack(**source, name="tiny"),  # type: ignore[arg-type]
        pack(**source, name="narrow", handler={"max_queue": 1}),  # type: ignore[arg-type]
    ]


@pytest.fixture(scope="session")
def server(archives: list[Path]) -> Iterator[Server]:
    yield from run_server(archives)
