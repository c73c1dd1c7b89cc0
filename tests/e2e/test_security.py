"""What an attacker may try against a real server as it is configured by default: each attempt fails closed."""

from __future__ import annotations

import os
import shutil
import socket
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest
import requests

from archive_scripts.errors import CommandError
from archive_scripts.run_folder import RunFolder, Scope, bearer
from archive_scripts.server import CONFIG, TorchServe
from tests.e2e.conftest import STARTUP_SECONDS, free_ports

pytestmark = pytest.mark.faults

TIMEOUT = 60
TOKEN_SECONDS = 6
SECRETS = {"HF_TOKEN": "sesame", "AWS_SECRET_ACCESS_KEY": "sesame", "MY_API_KEY": "sesame"}
SHORT: dict[str, Any] = {"prompt": "jazz", "duration": 0.1, "seed": 1}


@dataclass(frozen=True)
class Locked:
    """A server with the project's configuration, but that its tokens expire soon."""

    torchserve: TorchServe
    port: int

    @property
    def running(self) -> RunFolder:
        return self.torchserve.running

    @property
    def url(self) -> str:
        return f"{self.torchserve.url}/predictions/tiny"

    @property
    def management(self) -> str:
        return f"http://127.0.0.1:{self.port + 1}"

    def token(self, scope: Scope = "inference") -> dict[str, str]:
        return bearer(self.running.token(scope))

    def post(self, **options: Any) -> requests.Response:
        options.setdefault("headers", {})
        options["headers"] = self.token() | options["headers"]
        return requests.post(self.url, timeout=TIMEOUT, **options)

    def still_serves(self) -> bool:
        return self.post(json=SHORT).ok

    def processes(self) -> list[psutil.Process]:
        launcher = psutil.Process(self.torchserve._launcher.pid)
        return [launcher, *launcher.children(recursive=True)]


@pytest.fixture(scope="module")
def locked(archives: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Locked]:
    folder = tmp_path_factory.mktemp("config")
    for file in (CONFIG, CONFIG.with_name("metrics.yaml")):
        shutil.copy(file, folder)
    with (folder / CONFIG.name).open("a") as config:
        config.write(f"token_expiration_min={TOKEN_SECONDS / 60}\n")
    port = free_ports(3)
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SECRETS.items():
            patch.setenv(name, value)
        torchserve = TorchServe(archives[:1], port, config=folder / CONFIG.name)
    with torchserve:
        torchserve.wait_until_loaded("tiny", STARTUP_SECONDS)
        yield Locked(torchserve, port)


# ---- tokens


PATHS = ["", "/1.0/play/jazz.wav", "/1.0/v1/audio/speech", "/1.0/v1/models", "/1.0/cancel"]


@pytest.mark.parametrize("path", PATHS)
def test_nothing_is_answered_without_the_token_or_with_another(locked: Locked, path: str) -> None:
    right = locked.running.token("inference")
    wrong = [
        {},
        {"Authorization": right},
        {"Authorization": f"Basic {right}"},
        {"Authorization": "Bearer "},
        {"Authorization": "Bearer wrong"},
        {"Authorization": f"Bearer {right[:-1]}"},
        locked.token("management"),
    ]
    for headers in wrong:
        for ask in (requests.get, requests.post):
            response = ask(locked.url + path, headers=headers, timeout=TIMEOUT)
            assert response.status_code == 400, headers
            assert response.json()["type"] == "InvalidKeyException"


def test_an_expired_token_is_refused_and_a_new_one_taken(locked: Locked) -> None:
    token = locked.token()

    def ask() -> requests.Response:
        return requests.post(locked.url, json=SHORT, headers=token, timeout=TIMEOUT)

    assert ask().status_code == 200
    deadline = time.monotonic() + 10 * TOKEN_SECONDS
    while (response := ask()).status_code == 200:
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert response.status_code == 400
    assert "expired" in response.json()["message"].lower()
    assert locked.still_serves()


def test_the_server_is_managed_with_the_management_token_alone(locked: Locked) -> None:
    attempts = [
        ("GET", "/models"),
        ("GET", "/models/tiny"),
        ("POST", "/models?url=tiny.mar"),
        ("PUT", "/models/tiny?min_worker=9"),
        ("PUT", "/models/tiny/1.0/set-default"),
        ("DELETE", "/models/tiny"),
        ("GET", "/token?type=management"),
    ]
    for method, path in attempts:
        for headers in ({}, bearer("wrong"), locked.token("inference")):
            response = requests.request(method, locked.management + path, headers=headers, timeout=TIMEOUT)
            assert response.status_code == 400, (method, path)
    assert locked.still_serves()


@pytest.mark.parametrize(
    "url", ["http://192.0.2.1/x.mar", "https://192.0.2.1/x.mar", "file:///etc/passwd", "../x.mar", "/etc/passwd"]
)
def test_not_even_the_management_token_brings_in_an_archive_from_elsewhere(locked: Locked, url: str) -> None:
    response = requests.post(
        f"{locked.management}/models", params={"url": url}, headers=locked.token("management"), timeout=TIMEOUT
    )
    assert response.status_code in (400, 404)
    assert locked.still_serves()


# ---- what can be seen from outside


def test_only_this_machine_can_connect(locked: Locked) -> None:
    listening = [
        connection.laddr
        for process in locked.processes()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert {address.port for address in listening} >= {locked.port, locked.port + 1, locked.port + 2}
    assert {address.ip.removeprefix("::ffff:") for address in listening} <= {"127.0.0.1", "::1"}


def test_only_the_owner_can_read_the_tokens(locked: Locked) -> None:
    assert locked.running.path.stat().st_mode & 0o077 == 0
    assert (locked.running.path / "key_file.json").stat().st_mode & 0o077 == 0


def test_workers_do_not_see_the_secrets_of_who_started_the_server(locked: Locked) -> None:
    [status] = requests.get(
        f"{locked.management}/models/tiny", headers=locked.token("management"), timeout=TIMEOUT
    ).json()
    worker = psutil.Process(status["workers"][0]["pid"])
    for process in [worker, *worker.children(recursive=True)]:
        environment = process.environ()
        assert "TMPDIR" in environment
        assert "sesame" not in environment.values()


def test_other_origins_pages_get_no_permission(locked: Locked) -> None:
    origin = {"Origin": "https://elsewhere.example", "Access-Control-Request-Method": "POST"}
    for response in (
        locked.post(json=SHORT, headers=origin),
        requests.options(locked.url, headers=locked.token() | origin, timeout=TIMEOUT),
    ):
        assert not [name for name in response.headers if name.lower().startswith("access-control-")]


# ---- what a request may bring


@pytest.mark.parametrize(
    "options",
    [
        {"json": {"prompt": "la " * 2_000_000}},
        {"data": {"prompt": "la " * 2_000_000}},
        {"data": "la " * 2_000_000, "headers": {"Content-Type": "text/plain"}},
        {"json": {"la" * 1_000_000: 1}},
        {"json": {**SHORT, "seed": [[]] * 1_000_000}},
    ],
    ids=["json", "form", "text", "name", "list"],
)
def test_megabytes_of_prompt_are_refused_in_few_words(locked: Locked, options: dict[str, Any]) -> None:
    response = locked.post(**options)
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request"
    assert len(response.content) < 1000
    assert locked.still_serves()


def test_a_body_beyond_the_bound_is_refused(locked: Locked) -> None:
    assert locked.post(data=bytes(65 * 2**20), headers={"Content-Type": "text/plain"}).status_code == 413
    assert locked.still_serves()


BREAKING_OUT = "jazz\r\nx-evil: 1\r\n\r\n<script>"


def test_a_prompt_cannot_add_a_header(locked: Locked) -> None:
    prompt = {**SHORT, "prompt": BREAKING_OUT}
    asked = [(prompt, 200), ({**prompt, "stream": True}, 200), ({**SHORT, BREAKING_OUT: 1}, 400)]
    for fields, status in asked:
        response = locked.post(json=fields)
        assert response.status_code == status
        assert "x-evil" not in response.headers
    path = "/1.0/play/jazz%0d%0ax-evil:%201%0d%0a%0d%0a.wav"
    assert "x-evil" not in requests.get(locked.url + path, headers=locked.token(), timeout=TIMEOUT).headers


def test_a_request_s_own_id_cannot_add_a_header(locked: Locked) -> None:
    address = urlsplit(locked.url)
    request = (
        f"GET {address.path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {locked.running.token('inference')}\r\n"
        "X-Request-Id: a\r\n x-evil: 1\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", locked.port), timeout=TIMEOUT) as connection:
        connection.sendall(request.encode())
        head = connection.recv(4096).partition(b"\r\n\r\n")[0]
    assert head.startswith(b"HTTP/1.1 ")
    assert b"\nx-evil" not in head.lower()


# ---- what an archive may bring


@pytest.fixture
def spoiled(archives: list[Path], tmp_path: Path) -> Path:
    return Path(shutil.copy(archives[0], tmp_path / "spoiled.mar"))


def test_an_archive_cannot_write_outside_its_folder(spoiled: Path) -> None:
    with zipfile.ZipFile(spoiled, "a") as held:
        for up in range(1, 5):
            held.writestr("../" * up + "evil.txt", "evil")
    with TorchServe([spoiled], free_ports(3), open_profile=True) as server:
        with pytest.raises(CommandError, match="cannot read"):
            server.wait_until_loaded("spoiled", STARTUP_SECONDS)
        for folder in (server.folder, *server.folder.parents):
            assert not list(folder.glob("evil.txt"))
        assert not list(server.folder.rglob("evil.txt"))


def test_a_link_in_an_archive_leads_nowhere(spoiled: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("sesame")
    link = zipfile.ZipInfo("handler/link")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(spoiled, "a") as held:
        held.writestr(link, str(secret))
    with TorchServe([spoiled], free_ports(3), open_profile=True) as server:
        deadline = time.monotonic() + STARTUP_SECONDS
        while not (found := list(server.folder.glob("tmp/models/*/handler/link"))) or not found[0].stat().st_size:
            assert time.monotonic() < deadline
            time.sleep(0.1)
        [unpacked] = found
        assert not unpacked.is_symlink()
        assert unpacked.read_text() == os.fspath(secret)
