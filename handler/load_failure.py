"""Why a worker could not load its model, for the commands that watch a server.

TorchServe calls such a worker READY: it stays, to answer requests with the cause. So the worker leaves the cause in a
file in the server's temporary folder, which only the server's owner can read.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

FOLDER = "failed"


def record_failure(folder: Path, variant: str, version: str, cause: str) -> None:
    """Leave the cause for this process, if there is a place for it: `serve` makes one."""
    with suppress(OSError):
        (folder / FOLDER / f"{_version_name(variant, version)}@{os.getpid()}").write_text(cause)


def failures(folder: Path, variant: str, version: str) -> dict[int, str]:
    """The causes that workers of a version have left, by pid, the latest last."""
    files = [
        file for file in (folder / FOLDER).glob("*") if file.name.rpartition("@")[0] == _version_name(variant, version)
    ]
    files.sort(key=lambda file: file.stat().st_mtime_ns)
    return {int(file.name.rpartition("@")[2]): file.read_text() for file in files}


def _version_name(variant: str, version: str) -> str:
    return f"{quote(variant, safe='')}@{quote(version, safe='')}"
