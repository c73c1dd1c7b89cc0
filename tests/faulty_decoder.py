"""The decoder's program with what FFmpeg might do to it: a file's bytes say which."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from handler import decoder_process

_decode = decoder_process.decode


def _faulty(data: bytes, start: float | None, end: float | None) -> Iterator[tuple[bytes, bytes]]:
    match data:
        case b"crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        case b"abort":
            os.abort()
        case b"exit":
            os._exit(3)
        case b"spin":
            while True:
                pass
        case b"sleep":
            time.sleep(600)
        case b"memory":
            held = []
            while True:
                held.append(bytes(2**24))
        case b"open":
            Path("/etc/passwd").read_bytes()
        case b"connect":
            socket.create_connection(("127.0.0.1", 9), timeout=1)
        case b"garbled":
            sys.stdout.buffer.write(b"\xff" * 100)
            sys.stdout.flush()
    yield from _decode(data, start, end)


if __name__ == "__main__":
    decoder_process.decode = _faulty
    decoder_process.main()
