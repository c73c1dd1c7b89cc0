"""Serving opens no connection: neither what it imports, nor loading a model, nor making a clip."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from archive_scripts.pack import pack

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"

# Python runs this before anything else, in the engine's process too.
SITECUSTOMIZE = """
import os, sys

WATCHED = ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.sendto",
           "socket.bind")

def watch(event, arguments):
    if event not in WATCHED:
        return
    if event.startswith("socket.get") or not isinstance(arguments[-1], (str, bytes)):  # else the path of a socket
        with open(os.environ["ATTEMPTS"], "a") as file:
            file.write(f"{event} {arguments[1:]}\\n")
        raise PermissionError(f"{event}: serving must not use the network")

sys.addaudithook(watch)
open(os.environ["ATTEMPTS"] + f".watched-{os.getpid()}", "w").close()
"""

# As a worker does it: the archive's folder first on the path, its entry loaded, a request answered.
SERVE = """
import asyncio, json, sys
sys.path.insert(0, sys.argv[1])

def main():
    from types import SimpleNamespace
    from ts.context import Context
    from handler.engine.messages import Job
    from handler.params import Clip, GenerationParams
    from musicgen_handler import MusicGenHandler, whole_clip

    config = {"asyncCommunication": True}
    context = Context("small", sys.argv[1], {"model": {"modelVersion": "1.0"}}, 1, None, "1", model_yaml_config=config)
    context.metrics = SimpleNamespace(get_metric=lambda *_: SimpleNamespace(add_or_update=lambda *_: None))
    handler = MusicGenHandler()
    handler.initialize(context)
    job = Job("one", Clip("jazz"), GenerationParams(duration=0.2, seed=1))
    wav = asyncio.run(whole_clip(handler.inference(job, None)))
    handler.engine.close()
    print(json.dumps(list(wav.shape)))

if __name__ == "__main__":
    main()
"""


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("store")
    return pack(str(GOLDENS / "text_mono"), output=store, hub_dir=GOLDENS / "hub", archive_format="no-archive")


def run(tmp_path: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    (tmp_path / "sitecustomize.py").write_text(SITECUSTOMIZE)
    script = tmp_path / "serve.py"
    script.write_text(code)
    # Nothing that would keep the libraries off the network by itself.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment |= {"PYTHONPATH": str(tmp_path), "ATTEMPTS": str(tmp_path / "attempts"), "TMPDIR": str(tmp_path)}
    command = [sys.executable, str(script), *arguments]
    return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)


def test_a_model_is_loaded_and_makes_a_clip_without_an_attempt_to_connect(archive: Path, tmp_path: Path) -> None:
    served = run(tmp_path, SERVE, str(archive))
    assert served.returncode == 0, served.stderr
    assert json.loads(served.stdout.splitlines()[-1]) == [1, 6400]
    assert len(list(tmp_path.glob("attempts.watched-*"))) >= 2  # the worker, and its engine
    assert not (tmp_path / "attempts").exists(), (tmp_path / "attempts").read_text()


@pytest.mark.parametrize(
    "code",
    [
        "import socket; socket.create_connection(('192.0.2.1', 443), timeout=1)",
        "import urllib.request; urllib.request.urlopen('https://192.0.2.1/')",
        "import httpx2; httpx2.get('https://192.0.2.1/')",
        "from huggingface_hub import model_info; model_info('facebook/musicgen-small')",
    ],
)
def test_an_attempt_would_be_seen(code: str, tmp_path: Path) -> None:
    tried = run(tmp_path, code)
    assert tried.returncode != 0
    assert (tmp_path / "attempts").exists(), tried.stderr
