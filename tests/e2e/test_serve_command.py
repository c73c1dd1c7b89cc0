"""`python -m archive_scripts serve`, as an operator runs it."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import soundfile

from tests.e2e.conftest import free_ports

ROOT = Path(__file__).resolve().parents[2]


def _serve(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "archive_scripts", "serve", "debug", "--port", str(free_ports(3)), *arguments]
    return subprocess.Popen(
        command,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _until(serving: subprocess.Popen[str], line: str) -> str:
    assert serving.stdout is not None
    seen = ""
    for text in serving.stdout:
        seen += text
        if text.startswith(line):
            return seen
    raise AssertionError(f"ended before {line!r}:\n{seen}")


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    process = _serve(tmp_path)
    yield process
    process.terminate()
    process.communicate(timeout=60)


def test_it_saves_a_first_clip_answers_with_the_token_and_leaves_nothing_behind(
    serving: subprocess.Popen[str], tmp_path: Path
) -> None:
    seen = _until(serving, "Ctrl-C stops the server")
    assert soundfile.info(tmp_path / "clips" / "debug.wav").duration == pytest.approx(4)

    lines = [line.strip() for line in seen.splitlines()]
    key, curl = (next(line for line in lines if line.startswith(start)) for start in ("KEY=", "curl "))
    for line, status in ((f"{key}\n{curl}", "200"), (f"KEY=wrong\n{curl}", "400")):
        shell = ["bash", "-euc", line + " --silent --write-out '%{http_code}'"]
        assert subprocess.run(shell, cwd=tmp_path, capture_output=True, text=True, check=True).stdout == status

    started = psutil.Process(serving.pid).children(recursive=True)
    folder = Path(re.findall(r"private folder: (\S+)\)", seen)[0])
    assert folder.stat().st_mode & 0o077 == 0
    serving.send_signal(signal.SIGTERM)
    assert serving.wait(timeout=60) == 0
    assert not psutil.wait_procs(started, timeout=10)[1]
    assert not folder.exists()


@pytest.mark.faults
def test_an_archive_that_cannot_be_loaded_ends_it_with_the_reason(tmp_path: Path) -> None:
    checkpoint = tmp_path / "broken"
    subprocess.run(
        [sys.executable, "-m", "archive_scripts", "debug", str(checkpoint)], cwd=ROOT, check=True, capture_output=True
    )
    (checkpoint / "hub" / "t5-base" / "config.json").write_text("{}")
    command = [sys.executable, "-m", "archive_scripts", "serve", str(checkpoint), "--port", str(free_ports(3))]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2
    assert "serve: TorchServe could not load its models: the model could not be loaded: CheckpointError: " in run.stderr
    assert "Traceback" not in run.stderr
