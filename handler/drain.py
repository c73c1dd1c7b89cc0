"""Draining: what was accepted is finished, and what comes meanwhile is refused.

TorchServe has nothing of the kind: it ends a worker with whatever that is doing, and the clients wait for ever. So
whoever is about to end workers asks them first, by an empty file in the server's temporary folder, which nobody but
the server's owner can write.
"""

from __future__ import annotations

import os
from pathlib import Path
from urllib.parse import quote

FOLDER = "draining"
SERVER = "server"
"""The file that asks every worker of the server."""


def version_file(variant: str, version: str) -> str:
    """The file that asks every worker of a version."""
    return f"version-{quote(variant, safe='')}@{version}"


def worker_file(pid: int) -> str:
    """The file that asks one worker."""
    return f"worker-{pid}"


class Drain:
    """Whether the worker of this process has been asked to drain.

    Args:
        folder: the server's temporary one.
        variant, version: what the worker serves.
    """

    def __init__(self, folder: Path, variant: str, version: str) -> None:
        names = (SERVER, version_file(variant, version), worker_file(os.getpid()))
        self._files = [folder / FOLDER / name for name in names]

    @property
    def requested(self) -> bool:
        return any(file.exists() for file in self._files)
