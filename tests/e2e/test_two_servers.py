"""Two servers behind HAProxy, with the project's configurations: a gate before each, and the router before both."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import requests

from archive_scripts.pack import pack
from archive_scripts.server import TorchServe
from tests.e2e.conftest import GOLDENS, STARTUP_SECONDS, free_ports
from tests.haproxy import haproxy

pytestmark = pytest.mark.faults

NAMES = ("one", "two")
ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 120
RUNNING, WAITING = 4, 16
LONG = 40
"""Seconds of a clip that takes seconds to make."""


@dataclass(frozen=True)
class Reply:
    """What a client got, and from which server; not `whole` when the connection ended before the reply did."""

    status: int
    body: bytes
    whole: bool
    server: str


class Site:
    """Two servers, the gate before each, and the router before both."""

    def __init__(self, archive: Path, stack: ExitStack) -> None:
        self._archive, self._stack = archive, stack
        first = free_ports(5 * len(NAMES) + 1)
        self.ports = {name: first + 5 * number for number, name in enumerate(NAMES)}
        self.token = secrets.token_hex(16)
        self.authorization = {"Authorization": f"Bearer {self.token}"}
        self.gates = {name: f"127.0.0.1:{port + 3}" for name, port in self.ports.items()}
        self.gate_metrics = {name: f"127.0.0.1:{port + 4}" for name, port in self.ports.items()}
        self.servers = {name: self._start(name) for name in NAMES}
        for name, port in self.ports.items():
            addresses = {
                "MUSICGEN_GATE": self.gates[name],
                "MUSICGEN_GATE_METRICS": self.gate_metrics[name],
                "MUSICGEN_TORCHSERVE": f"127.0.0.1:{port}",
                "MUSICGEN_TORCHSERVE_METRICS": f"127.0.0.1:{port + 2}",
            }
            stack.enter_context(haproxy("gate.cfg", MUSICGEN_TOKEN=self.token, **addresses))
        for server in self.servers.values():
            server.wait_until_loaded("small", STARTUP_SECONDS)
        router = f"127.0.0.1:{first + 5 * len(NAMES)}"
        addresses = {"MUSICGEN_ROUTER": router, "MUSICGEN_ONE": self.gates["one"], "MUSICGEN_TWO": self.gates["two"]}
        stack.enter_context(haproxy("router.cfg", "machines.cfg", MUSICGEN_TOKEN=self.token, **addresses))
        self.url = f"http://{router}"
        for name in NAMES:
            self.wait_for(name)

    def ask(
        self,
        path: str = "",
        server: str | None = None,
        request_id: str | None = None,
        begun: threading.Event | None = None,
        **fields: Any,
    ) -> Reply:
        """Have a clip made; by the router's choice of server, or by one through its gate.

        Args:
            begun: set when the reply has.
        """
        url = f"http://{self.gates[server]}" if server else self.url
        headers = self.authorization | ({"x-request-id": request_id} if request_id else {})
        with requests.post(
            f"{url}/predictions/small{path}", json=fields, headers=headers, timeout=TIMEOUT, stream=True
        ) as response:
            if begun is not None:
                begun.set()
            body, whole = b"", True
            try:
                for piece in response.iter_content(None):
                    body += piece
            except requests.exceptions.ChunkedEncodingError:
                whole = False
            return Reply(response.status_code, body, whole, response.headers.get("x-served-by", ""))

    def kill(self, name: str) -> None:
        """End all processes of a server at once, as when its machine loses its power."""
        os.killpg(self.servers[name]._launcher.pid, signal.SIGKILL)

    def restart(self, name: str) -> None:
        self.servers[name] = self._start(name)
        self.servers[name].wait_until_loaded("small", STARTUP_SECONDS)
        self.wait_for(name)

    def wait_for(self, name: str) -> None:
        """Return once the router sends requests to a server."""
        deadline = time.monotonic() + STARTUP_SECONDS
        while time.monotonic() < deadline:
            with contextlib.suppress(requests.ConnectionError):
                if self.ask(duration=0.1).server == name:
                    return
            time.sleep(0.1)
        raise AssertionError(f"the router has sent nothing to {name}")

    def _start(self, name: str) -> TorchServe:
        return self._stack.enter_context(TorchServe([self._archive], self.ports[name], open_profile=True))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    archive = pack(
        str(GOLDENS / "text_mono"),
        output=tmp_path_factory.mktemp("store"),
        hub_dir=GOLDENS / "hub",
        name="small",
        handler={"max_concurrency": RUNNING, "max_queue": WAITING, "threads": 1},
    )
    with ExitStack() as stack:
        yield Site(archive, stack)


def error_of(response: requests.Response) -> dict[str, Any]:
    error: dict[str, Any] = response.json()["error"]
    assert error["code"] == response.status_code
    return error


@pytest.mark.parametrize("authorization", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": "Bearer "}])
def test_nothing_is_made_without_the_token(site: Site, authorization: dict[str, str]) -> None:
    for address in (site.url, *(f"http://{gate}" for gate in site.gates.values())):
        response = requests.post(
            f"{address}/predictions/small", json={"duration": 0.1}, headers=authorization, timeout=TIMEOUT
        )
        assert response.status_code == 401
        assert response.headers["www-authenticate"] == "Bearer"
        assert error_of(response)["type"] == "unauthorized"


def test_a_gate_opens_to_predictions_and_metrics_and_to_nothing_else(site: Site) -> None:
    gate, metrics = (f"http://{addresses['one']}" for addresses in (site.gates, site.gate_metrics))
    for path in ("/", "/models", "/ping", "/api-description", "/metrics", "/predictions", "/explanations/small"):
        assert requests.get(gate + path, headers=site.authorization, timeout=TIMEOUT).status_code == 404, path
    assert "musicgen_queue_depth" in requests.get(f"{metrics}/metrics", timeout=TIMEOUT).text
    assert requests.get(f"{metrics}/models", timeout=TIMEOUT).status_code == 404
    assert requests.post(f"{metrics}/metrics", timeout=TIMEOUT).status_code == 405


def test_a_variant_that_nobody_serves_is_a_404(site: Site) -> None:
    for path in (
        "/predictions/large",
        "/models",
        "/predictions/router:nothing",
        "/predictions/cancel:small",
        "/predictions/..",
    ):
        response = requests.post(site.url + path, json={}, headers=site.authorization, timeout=TIMEOUT)
        assert error_of(response)["type"] == "not_found"


def test_a_cancel_reaches_the_server_that_has_the_request(site: Site) -> None:
    names = [f"song-{number}" for number in range(4)]
    with ThreadPoolExecutor(len(names)) as pool:
        clips = [pool.submit(site.ask, request_id=name, duration=120) for name in names]
        until(lambda: in_flight_on(site, "one") > 0 and in_flight_on(site, "two") > 0)
        assert [site.ask("/1.0/cancel", request_id=name).status for name in names] == [200] * len(names)
        replies = [clip.result() for clip in clips]
    assert [reply.status for reply in replies] == [499] * len(names)
    assert {reply.server for reply in replies} == set(NAMES)
    assert site.ask("/1.0/cancel", request_id=names[0]).status == 404


def test_a_request_that_one_server_is_too_full_for_is_made_by_the_other(site: Site) -> None:
    # The router knows nothing of these, so it goes on choosing the full server too.
    with ThreadPoolExecutor(RUNNING + WAITING + 1) as pool:
        fill = [pool.submit(site.ask, server="one", duration=120, timeout=6) for _ in range(RUNNING + WAITING + 1)]
        until(lambda: any(filler.done() for filler in fill))
        replies = [site.ask(duration=0.1) for _ in range(6)]
        assert site.ask(server="one", duration=0.1).status == 503
        assert [(reply.status, reply.server) for reply in replies] == [(200, "two")] * len(replies)
        assert sorted(filler.result().status for filler in fill) == [503] + [504] * (RUNNING + WAITING)


@pytest.mark.load
def test_when_a_server_is_killed_under_load_no_request_fails_and_its_streams_end_short(site: Site) -> None:
    assert canary(site, "one") == (0, "every model makes music\n")
    streams: list[dict[str, Any]] = [
        {"prompt": f"stream {seed}", "duration": LONG, "seed": seed, "stream": True, "format": "pcm"}
        for seed in range(6)
    ]
    # Two that run and eight that wait, none of which can be done before its server is killed: a reply that has begun
    # cannot be begun again.
    wholes: list[dict[str, Any]] = [
        {"prompt": f"song {seed}", "duration": LONG if seed < 2 else 2, "seed": seed} for seed in range(10)
    ]
    with ThreadPoolExecutor(len(wholes) + len(streams)) as pool:
        begun = [threading.Event() for _ in streams]
        streaming = [pool.submit(site.ask, begun=event, **fields) for event, fields in zip(begun, streams, strict=True)]
        making = [pool.submit(site.ask, **fields) for fields in wholes[:2]]
        assert all(event.wait(TIMEOUT) for event in begun)
        making += [pool.submit(site.ask, **fields) for fields in wholes[2:]]
        until(lambda: in_flight_on(site, "one") > RUNNING and in_flight_on(site, "two") > RUNNING)
        assert not any(clip.done() for clip in [*making, *streaming])
        site.kill("one")
        made, heard = [clip.result() for clip in making], [stream.result() for stream in streaming]
        again = list(pool.map(lambda fields: site.ask(**fields), [*wholes[::3], *streams]))

    assert canary(site, "one")[0] == 1
    assert [(reply.status, reply.whole) for reply in made] == [(200, True)] * len(made)
    assert {reply.server for reply in [*made, *again]} == {"two"}
    assert [reply.body for reply in made[::3]] == [reply.body for reply in again[: -len(streams)]]
    assert {reply.server for reply in heard} == set(NAMES)
    for reply, whole in zip(heard, again[-len(streams) :], strict=True):
        assert reply.whole == (reply.server == "two")
        assert reply.body == whole.body if reply.whole else whole.body.startswith(reply.body)

    site.restart("one")
    assert {site.ask(duration=0.1).server for _ in range(6)} == set(NAMES)


def canary(site: Site, name: str) -> tuple[int, str]:
    command = [sys.executable, "deploy/canary.py", "--port", str(site.ports[name]), "--seconds", "20"]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return run.returncode, run.stdout


def in_flight_on(site: Site, name: str) -> int:
    report = requests.get(f"http://{site.gate_metrics[name]}/metrics", timeout=TIMEOUT).text
    value = re.search(r"^musicgen_requests_in_flight\{.*\} ([0-9.]+)", report, re.MULTILINE)
    return int(float(value[1])) if value else 0


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)
