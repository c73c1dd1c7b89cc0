"""Decoders of uploaded audio: processes of their own, so that a file made to break FFmpeg breaks nothing else."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

logger = logging.getLogger(__name__)

PROGRAM = "handler.decoder_process"
_PACKAGES = str(Path(__file__).resolve().parents[1])

_MESSAGE = struct.Struct("<cI")
_COUNT = struct.Struct("<Q")
_LONGEST_MESSAGE = 64 * 2**20
_INHERITED = ("PATH", "LANG", "LC_ALL", "LD_LIBRARY_PATH", "TZ")
"""The variables that the process gets: it must not hold what an environment may, keys and tokens among it."""

_TICK = 0.1  # seconds between two looks whether the file is still wanted
_CPU_SECONDS = 10.0  # for a file, and one more for each `_CPU_SHARE` seconds that it may last
_CPU_SHARE = 40.0
_WALL_FACTOR = 6.0  # a machine's cores have other work


class FileRefusedError(Exception):
    """The file cannot be decoded; the message says why, for a person."""


class DecoderLostError(Exception):
    """No decoder can be had, for a reason that is not the file's."""


class DecodingAbandonedError(Exception):
    """The file's audio is no longer wanted."""


@dataclass(frozen=True, slots=True)
class Block:
    """Some of a file's samples.

    Attributes:
        samples: float32 [T, C]; may be empty.
        decoded: samples of each channel decoded from the file so far.
    """

    samples: NDArray[np.float32]
    decoded: int


class Decoding:
    """A file under way; iterate over it once.

    Attributes:
        sample_rate, channels: of the file.
        length: samples of each channel in the whole file; 0 until it is decoded.
    """

    def __init__(self, decoder: Decoder, sample_rate: int, channels: int) -> None:
        self.sample_rate = sample_rate
        self.channels = channels
        self.length = 0
        self._decoder = decoder

    def __iter__(self) -> Iterator[Block]:
        while True:
            kind, payload = self._decoder.next_message()
            if kind == b"e":
                [self.length] = _COUNT.unpack(payload)
                return
            try:
                samples = np.frombuffer(payload, np.float32, offset=_COUNT.size).reshape(-1, self.channels)
                block = Block(samples, _COUNT.unpack_from(payload)[0])
            except (ValueError, struct.error) as error:
                raise self._decoder.broken() from error
            yield block


class Decoder:
    """One process; it is started when it is needed, and again after its end. For one thread at a time."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._until = 0.0
        self._wanted: Callable[[], bool] = lambda: True

    @property
    def pid(self) -> int | None:
        """Of the process; None: there is none."""
        return None if self._process is None else self._process.pid

    def open(
        self,
        data: bytes,
        start: float | None,
        end: float | None,
        max_seconds: float,
        wanted: Callable[[], bool] = lambda: True,
    ) -> Decoding:
        """Begin with a file, and give up what was under way.

        Args:
            data: the file.
            start, end: the seconds of it that are sent; None: from its beginning, to its end.
            max_seconds: that it may last; bounds the time that decoding may take.
            wanted: asked every moment; once it is false, nothing more is decoded.

        Raises:
            FileRefusedError: it cannot be decoded; while iterating, too.
            DecoderLostError: the process cannot be started, or was killed by somebody else, twice.
            DecodingAbandonedError: it is no longer wanted.
        """
        cpu_seconds = _CPU_SECONDS + max_seconds / _CPU_SHARE
        command = {"size": len(data), "start": start, "end": end, "cpu_seconds": int(cpu_seconds)}
        self._wanted = wanted
        for attempt in range(2):
            self._until = time.monotonic() + _WALL_FACTOR * cpu_seconds
            if self._process is not None and self._process.poll() is not None:
                self.close()  # it died while it was idle
            if self._process is None:
                self._start()
            try:
                _, payload = self._ask(json.dumps(command).encode() + b"\n", data)
                break
            except DecoderLostError:  # while it was idle, or for want of memory
                if attempt:
                    raise
        try:
            found = json.loads(payload)
            return Decoding(self, int(found["rate"]), int(found["channels"]))
        except (ValueError, KeyError, TypeError) as error:
            raise self.broken() from error

    def next_message(self) -> tuple[bytes, bytes]:
        """The next message about the file; as `open` raises."""
        return self._ask(b"{}\n")

    def broken(self) -> FileRefusedError:
        """End a process that a file has made say what cannot be; the error for that."""
        self.close()
        return FileRefusedError("the decoder died of it, so it is damaged; convert it to wav or flac first")

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()

    def _start(self) -> None:
        environment = {name: os.environ[name] for name in _INHERITED if name in os.environ}
        environment |= {
            "PYTHONPATH": os.pathsep.join([_PACKAGES, *filter(None, sys.path)]),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OPENBLAS_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
        }
        try:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", PROGRAM],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                env=environment,
            )
        except OSError as error:
            raise DecoderLostError(f"the decoder's process cannot be started: {error}") from error
        assert process.stdin is not None
        os.set_blocking(process.stdin.fileno(), False)
        self._process = process

    def _ask(self, *pieces: bytes) -> tuple[bytes, bytes]:
        """Send a command; the answer to it."""
        try:
            self._check_wanted()
            for piece in pieces:
                self._write(piece)
            kind, size = _MESSAGE.unpack(self._read(_MESSAGE.size))
            if size > _LONGEST_MESSAGE:
                raise EOFError
            payload = self._read(size)
        except (EOFError, BrokenPipeError) as error:
            raise self._after_death() from error
        except BaseException:
            self.close()  # it may still be at work
            raise
        if kind == b"r":
            raise FileRefusedError(payload.decode(errors="replace"))
        return kind, payload

    def _write(self, data: bytes) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        descriptor, view = self._process.stdin.fileno(), memoryview(data)
        while view:
            self._wait(descriptor, write=True)
            view = view[os.write(descriptor, view[: 2**16]) :]

    def _read(self, size: int) -> bytes:
        assert self._process is not None
        assert self._process.stdout is not None
        descriptor, received = self._process.stdout.fileno(), bytearray()
        while len(received) < size:
            self._wait(descriptor, write=False)
            piece = os.read(descriptor, min(2**16, size - len(received)))
            if not piece:
                raise EOFError
            received += piece
        return bytes(received)

    def _wait(self, descriptor: int, write: bool) -> None:
        poll = select.poll()
        poll.register(descriptor, select.POLLOUT if write else select.POLLIN)
        while not poll.poll(1000 * _TICK):
            self._check_wanted()
            if time.monotonic() > self._until:
                raise FileRefusedError("it takes too long to decode; convert it to wav or flac first")

    def _check_wanted(self) -> None:
        if not self._wanted():
            raise DecodingAbandonedError("the audio is no longer wanted")

    def _after_death(self) -> Exception:
        """The error for a process that is gone, which the file in it may have caused."""
        assert self._process is not None
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            code = 0  # it only closed its pipes
        broken = self.broken()
        if code == -signal.SIGXCPU:
            return FileRefusedError("it takes too long to decode; convert it to wav or flac first")
        if code in (-signal.SIGKILL, -signal.SIGTERM) or code > 0:
            logger.error("a decoder of uploads ended (%d)", code)
            return DecoderLostError(f"the decoder's process ended ({code})")
        logger.warning("a decoder of uploads died of a file (%d)", code)
        return broken


class Decoders:
    """As many decoders as are in use at once; those not in use wait for the next file."""

    def __init__(self) -> None:
        self._idle: list[Decoder] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def one(self) -> Iterator[Decoder]:
        """A decoder for the time being."""
        with self._lock:
            decoder = self._idle.pop() if self._idle else Decoder()
        try:
            yield decoder
        finally:
            with self._lock:
                self._idle.append(decoder)
