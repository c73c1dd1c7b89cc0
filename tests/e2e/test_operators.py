"""What an operator can do by the management API: nothing of it leaves a client without an answer."""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import requests

from archive_scripts.__main__ import main
from archive_scripts.machine import is_taken
from archive_scripts.management import Management, Version
from tests.e2e.conftest import TIMEOUT, Server, eventually, free_ports
from tests.haproxy import haproxy

ANSWER_SECONDS = 20
JSON = "application/json"


@contextmanager
def registered(server: Server, archive: Path, name: str, **parameters: Any) -> Iterator[requests.Response]:
    """An archive on the server under a name of its own; gives the answer to its registration."""
    query = {"url": server.torchserve.running.link(archive), "model_name": name, "initial_workers": 1, **parameters}
    try:
        yield requests.post(f"{server.management}/models", params=query, timeout=TIMEOUT)
    finally:
        requests.delete(f"{server.management}/models/{name}", timeout=TIMEOUT)


def answers(server: Server, model: str, count: int) -> list[requests.Response]:
    """To so many requests at once; a client that has to wait for long fails the test."""
    body = {"prompt": "80s pop", "duration": 0.2, "seed": 1}
    with ThreadPoolExecutor(count) as pool:
        posted = [
            pool.submit(requests.post, server.url(model), json=body, timeout=ANSWER_SECONDS) for _ in range(count)
        ]
        return [reply.result() for reply in posted]


def test_the_gate_answers_every_method_and_makes_no_clip_for_a_head(server: Server) -> None:
    port = free_ports(2)
    token = secrets.token_hex(16)
    addresses = {
        "MUSICGEN_GATE": f"127.0.0.1:{port}",
        "MUSICGEN_GATE_METRICS": f"127.0.0.1:{port + 1}",
        "MUSICGEN_TORCHSERVE": server.torchserve.url.removeprefix("http://"),
    }
    gate = f"http://127.0.0.1:{port}"

    def ask(method: str, path: str) -> requests.Response:
        headers = {"authorization": f"Bearer {token}"}
        return requests.request(method, gate + path, headers=headers, timeout=ANSWER_SECONDS)

    types = {"mp3": "audio/mpeg", "wav": "audio/wav", "flac": "audio/flac", "ogg": "audio/ogg", "json": JSON}
    with haproxy("gate.cfg", MUSICGEN_TOKEN=token, **addresses):
        eventually(lambda: is_taken("127.0.0.1", port))
        answered = sum(server.measured("musicgen_requests_total").values())
        for name, content_type in types.items():
            clips = [f"/predictions/tiny/1.0/play/80s.%20pop.{name}", f"/tiny/predict?prompt=pop&format={name}"]
            for path in [*clips, *(["/tiny/1.0/predict?prompt=pop"] if name == "wav" else [])]:
                reply = ask("HEAD", path)
                assert (reply.status_code, reply.headers["content-type"]) == (200, content_type), path
                assert (reply.headers["accept-ranges"], reply.content) == ("none", b"")
                assert "content-length" not in reply.headers
        for method in ("PUT", "DELETE", "PATCH", "TRACE", "OPTIONS"):
            for path in ("/predictions/tiny", "/predictions/tiny/1.0/play/pop.mp3", "/tiny/predict?prompt=pop"):
                reply = ask(method, path)
                assert (reply.status_code, reply.headers["allow"]) == (405, "GET, HEAD, POST")
                assert reply.json()["error"]["type"] == "method_not_allowed"
        assert sum(server.measured("musicgen_requests_total").values()) == answered
        assert ask("HEAD", "/predictions/tiny").status_code == 200
        clip = ask("GET", "/tiny/predict?prompt=pop&duration=0.2&seed=1")
        assert clip.content == server.post(prompt="pop", duration=0.2, seed=1).content


def version(server: Server, name: str) -> Version:
    return Management(server.torchserve.running).version(name)


def command(server: Server, *arguments: str) -> int:
    return main([*arguments, "--port", str(server.torchserve.running.port)])


@pytest.mark.parametrize("batch_size", [2, 8])
@pytest.mark.parametrize("synchronous", ["true", "false"])
def test_a_batch_size_above_1_is_refused_with_the_reason_and_no_request_hangs(
    server: Server, archives: list[Path], batch_size: int, synchronous: str, capsys: pytest.CaptureFixture[str]
) -> None:
    name = f"batched-{batch_size}-{synchronous}"
    with registered(server, archives[2], name, batch_size=batch_size, synchronous=synchronous) as reply:
        if synchronous == "true":
            assert (reply.status_code, "Failed to start workers" in reply.text) == (500, True)
        else:
            eventually(lambda: not version(server, name).workers)
            assert command(server, "status") == 0
            assert f"{name} 1.0: its last worker could not load the model: the batch size is {batch_size}" in (
                capsys.readouterr().out
            )
        for count in (1, 2, 10):
            for answer in answers(server, name, count):
                assert answer.status_code in (404, 503), answer.text
        if synchronous == "false":
            again = f"{server.management}/models/{name}?min_worker=1&synchronous=true"
            assert requests.put(again, timeout=TIMEOUT).status_code >= 400
            described = requests.get(f"{server.management}/models/{name}?customized=true", timeout=ANSWER_SECONDS)
            assert described.status_code in (200, 503), described.text
            assert {answer.status_code for answer in answers(server, name, 2)} == {503}
        log = (server.torchserve.folder / "logs" / "server.log").read_text()
        assert f"{name} cannot be served: the batch size is {batch_size}" in log
        assert "register it with batch_size=1" in log
    assert [answer.status_code for answer in answers(server, "fragile", 2)] == [200, 200]


def test_a_batch_size_of_1_and_other_parameters_change_nothing_for_clients(
    server: Server, archives: list[Path]
) -> None:
    parameters = {"batch_size": 1, "max_batch_delay": 5000, "response_timeout": 1, "synchronous": "true"}
    with registered(server, archives[2], "odd name.é", **parameters) as reply:
        assert reply.status_code == 200, reply.text
        for count in (1, 2, 10):
            found = answers(server, "odd%20name.%C3%A9", count)
            assert [answer.status_code for answer in found] == [200] * count, found[0].text


@pytest.mark.parametrize("change", [{"batchSize": 8}, {"asyncCommunication": False}, {"continuousBatching": True}])
def test_an_archive_that_torchserve_would_run_in_another_way_is_refused(
    server: Server, archives: list[Path], tmp_path: Path, change: dict[str, Any]
) -> None:
    archive = tmp_path / "fragile"
    shutil.copytree(archives[2], archive)
    config = archive / "model-config.yaml"
    kept = [line for line in config.read_text().splitlines() if line.partition(":")[0] not in change]
    config.write_text("\n".join([*kept, *(f"{key}: {json.dumps(value)}" for key, value in change.items())]))
    manifest = archive / "MAR-INF" / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"modelVersion": "1.0"', '"modelVersion": "3.0"'))
    with registered(server, archive, "changed", synchronous="false"):
        eventually(lambda: version(server, "changed").failure is not None and not version(server, "changed").workers)
        for count in (1, 2, 10):
            assert {answer.status_code for answer in answers(server, "changed", count)} == {503}


def test_a_model_that_cannot_be_loaded_is_shown_as_failed_with_the_cause(
    server: Server, archives: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "fragile"
    shutil.copytree(archives[2], archive)
    weights = archive / "checkpoint" / "state_dict.bin"
    weights.write_bytes(weights.read_bytes()[:1000])
    manifest = archive / "MAR-INF" / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"modelVersion": "1.0"', '"modelVersion": "4.0"'))
    with registered(server, archive, "broken", synchronous="true"):
        eventually(lambda: version(server, "broken").failure is not None)
        capsys.readouterr()
        assert command(server, "status") == 0
        table = capsys.readouterr().out
        assert "0 of 1" in next(line for line in table.splitlines() if line.startswith("broken"))
        assert "broken 4.0: 1 of 1 workers could not load the model: " in table
        assert "state_dict.bin" in table
        assert command(server, "status", "--json") == 0
        told = json.loads(capsys.readouterr().out)
        [worker] = next(each for each in told["versions"] if each["variant"] == "broken")["workers"]
        assert (worker["status"], "state_dict.bin" in worker["failure"]) == ("FAILED", True)
        described = requests.get(f"{server.management}/models/broken?customized=true", timeout=ANSWER_SECONDS)
        [model] = described.json()
        error = model["customizedMetadata"]["error"]
        assert (error["code"], error["type"]) == (503, "unavailable")
        assert "state_dict.bin" in error["message"]
        for count in (1, 2, 10):
            for answer in answers(server, "broken", count):
                assert (answer.status_code, "state_dict.bin" in answer.json()["error"]["message"]) == (503, True)
        assert command(server, "set-default", "broken", "4.0") == 2
        assert "no worker that is ready" in capsys.readouterr().err
