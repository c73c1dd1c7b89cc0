"""The commands on a running server, with a stand-in for TorchServe."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from archive_scripts import run_folder
from archive_scripts.__main__ import main
from archive_scripts.members import MANIFEST
from handler.server_control import stop_workers
from tests.unit.stand_in import StandIn, keys_of, stand_in

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def server() -> Iterator[StandIn]:
    """It serves small 1.0, with the workers 11 and 12."""
    with stand_in() as server, subprocess.Popen(["sleep", "600"], cwd=server.folder.path) as process:
        server.add("small", "1.0", 11, 12)
        yield server
        process.kill()


@pytest.fixture
def run(server: StandIn, capsys: pytest.CaptureFixture[str]) -> Run:
    """A command on that server: its exit code and what it printed."""

    def run(*arguments: str) -> tuple[int, str, str]:
        code = main([*arguments, "--port", str(server.folder.port)])
        return code, *capsys.readouterr()

    return run


@pytest.fixture(autouse=True)
def _hurried(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("workload", "unregister"):
        monkeypatch.setattr(f"archive_scripts.{module}.SETTLE_SECONDS", 0.01)
    monkeypatch.setattr("archive_scripts.workload.POLL_SECONDS", 0.01)


def archive_of(folder: Path, version: str) -> str:
    """An archive, small, of which nothing but the manifest is there, and no weights."""
    checkpoint = folder / "small" / "checkpoint"
    checkpoint.mkdir(parents=True)
    (checkpoint / "SHA256SUMS").touch()
    manifest = folder / "small" / MANIFEST
    manifest.parent.mkdir(parents=True)
    manifest.write_text(json.dumps({"model": {"modelName": "small", "modelVersion": version}}))
    return str(folder / "small")


def store(server: StandIn) -> list[str]:
    return sorted(path.name for path in (server.folder.path / "store").iterdir())


def test_status_tells_what_is_served_and_how_busy_it_is(server: StandIn, run: Run) -> None:
    server.add("small", "2.0", 13)
    server.in_flight = {11: 2, 12: 1, 99: 40}  # the last one died
    code, out, _ = run("status")
    assert code == 0
    assert str(server.folder.path) in out
    first, second = (line.split() for line in out.splitlines()[2:])
    assert first == ["small", "1.0", "yes", "2", "of", "2", "small@1.0.mar", "3", "0"]
    assert second == ["small", "2.0", "1", "of", "1", "small@2.0.mar", "0", "0"]
    told = json.loads(run("status", "--json")[1])
    assert told["inference"] == server.folder.inference
    assert [worker["in_flight"] for worker in told["versions"][0]["workers"]] == [2, 1]


def test_list_served_names_the_versions(server: StandIn, run: Run) -> None:
    assert run("list", "--served")[1].splitlines()[1].split()[:3] == ["small", "1.0", "yes"]
    assert json.loads(run("list", "--served", "--json")[1])[0]["archive"] == "small@1.0.mar"


def test_a_new_version_is_loaded_tried_and_not_yet_the_default(server: StandIn, run: Run, tmp_path: Path) -> None:
    code, out, _ = run("register", archive_of(tmp_path, "2.0"))
    assert code == 0
    assert [line.split()[:3] for line in out.splitlines()[1:]] == [["small", "1.0", "yes"], ["small", "2.0", "2"]]
    assert len(server.versions["small", "2.0"]) == 2  # as many workers as the version it is to replace
    assert server.calls == ["POST /models", "PUT /models/small/2.0", "POST /predictions/small/2.0"]
    assert store(server) == ["small@2.0"]


def test_a_version_that_is_there_already_is_refused_with_the_way_out(server: StandIn, run: Run, tmp_path: Path) -> None:
    code, _, error = run("register", archive_of(tmp_path, "1.0"))
    assert code == 2
    assert "small 1.0 is on this server already; pack another version" in error
    assert not server.calls


def test_a_version_that_cannot_be_loaded_is_not_left_on_the_server(server: StandIn, run: Run, tmp_path: Path) -> None:
    server.fails = "Traceback (most recent call last):\nW-7-small_2.0-stdout MODEL_LOG - CheckpointError: no key 'emb'"
    code, _, error = run("register", archive_of(tmp_path, "2.0"))
    assert code == 2
    assert "small 2.0 was not registered: " in error
    assert "CheckpointError: no key 'emb'" in error
    assert ("small", "2.0") not in server.versions
    assert store(server) == []


def test_what_is_no_archive_is_refused(server: StandIn, run: Run, tmp_path: Path) -> None:
    (tmp_path / "small.mar").write_bytes(b"not a zip file")
    code, _, error = run("register", str(tmp_path / "small.mar"))
    assert (code, "not an archive" in error) == (2, True)
    assert not server.calls


def test_scaling_up_disturbs_nobody(server: StandIn, run: Run) -> None:
    server.in_flight = {11: 5}
    assert run("scale", "small", "3")[0] == 0
    assert len(server.versions["small", "1.0"]) == 3
    assert server.draining == [set()]


def test_scaling_down_waits_for_the_workers_that_go_and_has_them_refuse_what_is_new(server: StandIn, run: Run) -> None:
    server.in_flight = {11: 5, 12: 0}
    assert run("scale", "small", "1")[0] == 0
    assert server.versions["small", "1.0"] == [11]
    assert server.draining == [{"worker-12"}]
    assert not list((server.folder.path / "tmp" / "draining").iterdir())


@pytest.mark.parametrize("command", [("scale", "small", "1"), ("unregister", "small")])
def test_requests_that_take_too_long_are_not_cut_unless_forced(
    command: tuple[str, ...], server: StandIn, run: Run
) -> None:
    server.in_flight = {12: 3}
    code, _, error = run(*command, "--drain", "0.05")
    assert code == 2
    assert "3 requests were not finished in 0.05 s, so nothing was changed; give them more time" in error
    assert not server.calls
    assert not list((server.folder.path / "tmp" / "draining").iterdir())
    assert run(*command, "--drain", "0.05", "--force")[0] == 0
    assert len(server.calls) == 1


def test_an_upgrade_ends_with_the_new_version_alone(server: StandIn, run: Run) -> None:
    server.add("small", "2.0", 13)
    code, _, error = run("unregister", "small", "1.0")
    assert (code, "make another the default first: set-default small VERSION" in error) == (2, True)
    assert run("set-default", "small", "2.0")[1].splitlines()[2].split()[:3] == ["small", "2.0", "yes"]
    assert run("unregister", "small", "1.0")[0] == 0
    assert list(server.versions) == [("small", "2.0")]
    assert server.draining[-1] == {"version-small@1.0"}


def test_a_version_without_a_worker_does_not_become_the_default(server: StandIn, run: Run) -> None:
    server.add("small", "2.0")
    code, _, error = run("set-default", "small", "2.0")
    assert (code, "start one: scale small 1 --version 2.0" in error) == (2, True)


def test_of_two_versions_unregister_takes_none_unasked(server: StandIn, run: Run) -> None:
    server.add("small", "2.0", 13)
    code, _, error = run("unregister", "small")
    assert (code, "small has the versions 1.0, 2.0; say which one" in error) == (2, True)


@pytest.mark.parametrize(
    ("command", "error"),
    [
        (("scale", "large", "2"), "the server refused: Model not found: large"),
        (("set-default", "small", "3.0"), "small has no version 3.0 on this server; it has 1.0"),
    ],
)
def test_names_that_are_not_there_are_told(command: tuple[str, ...], error: str, server: StandIn, run: Run) -> None:
    code, _, told = run(*command)
    assert (code, error in told) == (2, True)


@pytest.mark.parametrize("count", ["0", "-1", "two", "1001"])
def test_workers_are_a_number_from_1_on(count: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["scale", "small", "--", count])
    assert "must be a number of workers, 1 to 1000" in capsys.readouterr().err


def test_tokens_are_printed_and_renewed(server: StandIn, run: Run) -> None:
    assert run("token")[1] == "fresh-inference\n"
    assert run("token", "management", "--renew")[1] == "renewed-management\n"
    assert json.loads(run("token", "--json")[1]) == {"inference": "renewed-inference"}


def test_a_token_that_has_expired_is_renewed_by_the_way(server: StandIn, run: Run) -> None:
    yesterday = (datetime.now(UTC) - timedelta(days=1)).date().isoformat()
    (server.folder.path / "key_file.json").write_text(json.dumps(keys_of("old", yesterday)))
    assert run("status")[0] == 0


def test_a_wrong_token_is_told(server: StandIn, run: Run) -> None:
    (server.folder.path / "key_file.json").write_text(json.dumps(keys_of("wrong", "2999-01-01")))
    code, _, error = run("status")
    assert (code, "the server refused: Token Authorization failed." in error) == (2, True)


def test_a_server_without_tokens_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    with stand_in(is_open=True) as server, subprocess.Popen(["sleep", "600"], cwd=server.folder.path) as process:
        assert main(["token", "--port", str(server.folder.port)]) == 2
        assert "asks for no tokens (serve --open)" in capsys.readouterr().err
        assert main(["status", "--port", str(server.folder.port)]) == 0
        process.kill()


def test_a_server_that_does_not_answer_is_told_with_where_its_logs_are(
    server: StandIn, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.folder.management = "http://127.0.0.1:9"
    monkeypatch.setattr("archive_scripts.status.find_server", lambda port: server.folder)
    code, _, error = run("status")
    assert code == 2
    assert "the server at http://127.0.0.1:9 does not answer: " in error
    assert f"its logs are in {server.folder.path}" in error


def test_without_a_server_the_message_says_how_to_start_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run_folder, "_running_servers", list)
    assert main(["status"]) == 2
    assert "start one: python -m archive_scripts serve VARIANT" in capsys.readouterr().err


def test_of_several_servers_one_has_to_be_chosen(
    server: StandIn, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with stand_in() as other:
        servers = [server.folder, other.folder]
        monkeypatch.setattr(run_folder, "_running_servers", lambda: servers)
        ports = ", ".join(str(port) for port in sorted(folder.port for folder in servers))
        assert main(["status"]) == 2
        assert f"at the ports {ports}; choose one with --port" in capsys.readouterr().err
        assert main(["status", "--port", "9"]) == 2
        assert f"no server of yours runs here at port 9; there are others, at {ports}" in capsys.readouterr().err


def test_the_folder_of_a_server_is_its_owner_s_alone(server: StandIn) -> None:
    assert server.folder.path.stat().st_mode & 0o077 == 0


def test_status_shows_a_worker_that_could_not_load_its_model_as_failed_with_the_cause(
    server: StandIn, run: Run
) -> None:
    failed = server.folder.path / "tmp" / "failed"
    (failed / "small@1.0@12").write_text("state_dict.bin is cut off")
    (failed / "small@1.0@9").write_text("of a worker that is gone")
    (failed / "other@1.0@11").write_text("of another variant")
    code, out, _ = run("status")
    assert code == 0
    assert out.splitlines()[2].split()[:6] == ["small", "1.0", "yes", "1", "of", "2"]
    assert out.splitlines()[-1] == "small 1.0: 1 of 2 workers could not load the model: state_dict.bin is cut off"
    [version] = json.loads(run("status", "--json")[1])["versions"]
    assert version["failure"] == "state_dict.bin is cut off"
    assert [(w["status"], w["failure"]) for w in version["workers"]] == [
        ("READY", None),
        ("FAILED", "state_dict.bin is cut off"),
    ]


def test_a_version_whose_last_worker_left_says_why(server: StandIn, run: Run) -> None:
    server.versions["small", "1.0"] = []
    (server.folder.path / "tmp" / "failed" / "small@1.0@9").write_text("the batch size is 8")
    assert "its last worker could not load the model: the batch size is 8" in run("status")[1]


def test_a_version_that_failed_does_not_become_the_default(server: StandIn, run: Run) -> None:
    server.add("small", "2.0", 13)
    (server.folder.path / "tmp" / "failed" / "small@2.0@13").write_text("no weights")
    code, _, error = run("set-default", "small", "2.0")
    assert (code, "has no worker that is ready" in error) == (2, True)


def test_scaling_ends_with_the_cause_if_a_worker_cannot_load_the_model(server: StandIn, run: Run) -> None:
    (server.folder.path / "tmp" / "failed" / "small@1.0@1000").write_text("memory is short")
    code, _, error = run("scale", "small", "3")
    assert (code, "TorchServe could not load its models: memory is short" in error) == (2, True)
    assert server.calls == ["PUT /models/small/1.0", "PUT /models/small/1.0"]  # and back


@pytest.mark.parametrize("is_open", [False, True])
def test_a_worker_finds_the_server_that_started_it_and_has_it_stop_its_workers(
    is_open: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)", "-f", "config.properties"]
    with stand_in(is_open) as server, subprocess.Popen(command, cwd=server.folder.path) as torchserve:
        monkeypatch.setattr("os.getppid", lambda: torchserve.pid)
        try:
            with pytest.raises(OSError, match="404"):
                stop_workers("small", "1.0")
            server.add("small", "1.0", 11, 12)
            stop_workers("small", "1.0")
        finally:
            torchserve.kill()
        assert server.versions["small", "1.0"] == []
        assert server.calls[-1] == "PUT /models/small/1.0"


def test_a_worker_whose_server_is_gone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.getppid", lambda: 2**22 + 1)
    with pytest.raises(OSError, match="the process that started this worker cannot be read"):
        stop_workers("small", "1.0")
