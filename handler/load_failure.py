"""Why a worker could not load its model, for the commands that watch a server.

TorchServe calls such a worker READY: it stays, to answer requests with the cause. So the worker leaves the cause in a
file in the server's temporary folder, which only the server's owner can read.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from urllib.parse import quote

import psutil

FOLDER = "failed"


def record_failure(folder: Path, variant: str, version: str, cause: str) -> None:
    """Leave the cause for this process, if there is a place for it: `serve` makes one."""
    file = _file(folder, variant, version, os.getpid())
    with suppress(OSError):
        unfinished = folder / FOLDER / f".{os.getpid()}"
        unfinished.write_text(cause)
        unfinished.replace(file)


def forget_failures(folder: Path, variant: str, version: str) -> None:
    """Remove the causes of processes that have ended, once this process has loaded the model."""
    for pid in failures(folder, variant, version):
        if pid == os.getpid() or not psutil.pid_exists(pid):
            _file(folder, variant, version, pid).unlink(missing_ok=True)


def failures(folder: Path, variant: str, version: str) -> dict[int, str]:
    """The causes that workers of a version have left, by pid, the latest last."""
    prefix = _file(folder, variant, version, 0).name.removesuffix("0")
    found = []
    for file in (folder / FOLDER).glob("*"):
        if file.name.startswith(prefix):
            with suppress(FileNotFoundError):  # removed meanwhile
                found.append((file.stat().st_mtime_ns, int(file.name.removeprefix(prefix)), file.read_text()))
    return {pid: cause for _, pid, cause in sorted(found)}


def _file(folder: Path, variant: str, version: str, pid: int) -> Path:
    return folder / FOLDER / f"{quote(variant, safe='')}@{quote(version, safe='')}@{pid}"
