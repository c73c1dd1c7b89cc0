"""Cancelling a request, whichever of a variant's workers has it.

TorchServe hands a cancel to any worker. So each worker listens on a socket in a folder they share, and the one that
is asked asks them all.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import socket
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path

_PATIENCE = 2.0  # seconds for a worker to answer
_LONGEST_ID = 256  # bytes
_LONGEST_PATH = 107  # bytes, of a socket


class CancelBoard:
    """Where the workers of one variant, of one server and user, pass cancels on.

    Args:
        variant: and its version: what they share.
        cancel: gives up this worker's requests of an id; says whether there was any.

    Raises:
        OSError: the temporary folder cannot hold the sockets; says why.
    """

    def __init__(self, variant: str, cancel: Callable[[str], bool]) -> None:
        self._cancel = cancel
        # The names of sockets are short (108 bytes), those of variants may not be.
        digest = hashlib.sha256(variant.encode()).hexdigest()[:12]
        self._folder = Path(tempfile.gettempdir()) / f"musicgen-{os.getuid()}-{digest}"
        self._folder.mkdir(mode=0o700, exist_ok=True)
        if self._folder.stat().st_uid != os.getuid():
            raise PermissionError(f"{self._folder} belongs to somebody else; set TMPDIR to a folder of your own")
        self._path = self._folder / f"{os.getpid()}.worker"
        if len(os.fsencode(self._answer_path())) > _LONGEST_PATH:
            raise OSError(f"{self._folder} is too long a path for a socket; set TMPDIR to a shorter one")
        self._path.unlink(missing_ok=True)
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self._path))
        threading.Thread(target=self._listen, name="cancel", daemon=True).start()

    def cancel(self, request_id: str) -> int:
        """Gives a request up, wherever it is; the number of workers that had it."""
        workers = sorted(self._folder.glob("*.worker"))
        answer_to = self._answer_path()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as answers:
            answers.bind(str(answer_to))
            answers.settimeout(_PATIENCE)
            try:
                asked = sum(self._ask(answers, worker, request_id) for worker in workers)
                cancelled = 0
                with contextlib.suppress(TimeoutError):
                    for _ in range(asked):
                        cancelled += answers.recv(1) == b"1"
            finally:
                answer_to.unlink(missing_ok=True)
        return cancelled

    def close(self) -> None:
        """Stops listening."""
        self._path.unlink(missing_ok=True)
        self._socket.close()

    def _answer_path(self) -> Path:
        """Where answers are heard; a new one each time, or a late answer would be taken for one to the next cancel."""
        return self._folder / f"{secrets.token_hex(4)}.answer"

    @staticmethod
    def _ask(answers: socket.socket, worker: Path, request_id: str) -> bool:
        try:
            answers.sendto(request_id.encode()[:_LONGEST_ID], str(worker))
        except (ConnectionRefusedError, FileNotFoundError):
            worker.unlink(missing_ok=True)  # of a worker that was killed
            return False
        except TimeoutError:
            return False  # of one that has not looked at many cancels already
        return True

    def _listen(self) -> None:
        while True:
            try:
                request_id, sender = self._socket.recvfrom(_LONGEST_ID)
            except OSError:
                return  # closed
            found = self._cancel(request_id.decode(errors="replace"))
            with contextlib.suppress(OSError):
                self._socket.sendto(b"1" if found else b"0", sender)
