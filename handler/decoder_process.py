"""The program that decodes uploads, one at a time, for `handler.decoder`, which starts it as a separate process.

It reads untrusted bytes with FFmpeg's C code. So it holds no secret, imports no torch, and gives up every right it does
not need: it cannot open a file or a socket or start a process, and its memory and CPU time for each file are limited.
It ends when its standard input closes.

Each command is a line of JSON: `open` (with the file's bytes after it) or `next`. Each is answered by one message:
a kind, a length, and a payload.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import resource
import signal
import struct
import sys
from collections.abc import Iterator
from typing import Any

import av
import numpy as np
from av.audio.frame import AudioFrame
from av.audio.stream import AudioStream
from av.packet import Packet

from handler.file_bytes import (
    aiff_is_joined,
    caf_is_joined,
    id3_size,
    is_tag,
    mp3_frame_size,
    mp3_frames,
    mp4_is_joined,
    ogg_is_cut,
    wav_is_cut,
    with_sizes,
    without_flac_tail,
    without_tags,
)

MESSAGE = struct.Struct("<cI")
FORMAT, BLOCK, END, REFUSAL = b"f", b"b", b"e", b"r"

CONTAINERS = {
    "wav": "wav",
    "flac": "flac",
    "ogg": "ogg",
    "mp3": "mp3",
    "aac": "aac",
    "mov,mp4,m4a,3gp,3g2,mj2": "mp4",
    "matroska,webm": "webm",
    "aiff": "aiff",
    "caf": "caf",
    "au": "au",
    "amr": "amr",
}
"""What is read: FFmpeg's name of each container, and the usual one. Nothing among them leads to another file."""

FORMATS = "wav, flac, mp3, ogg, opus, m4a, aac, webm, aiff, caf or au"

_CODECS = (
    "aac alac amrnb amrwb libopencore_amrnb libopencore_amrwb flac mp1float mp2float mp3float opus vorbis pcm_alaw "
    "pcm_mulaw pcm_f32be pcm_f32le pcm_f64be pcm_f64le pcm_s8 pcm_u8 pcm_s16be pcm_s16le pcm_s24be pcm_s24le pcm_s32be "
    "pcm_s32le adpcm_ima_qt adpcm_ima_wav adpcm_ms"
)

_OPTIONS = {
    "protocol_whitelist": "",
    "format_whitelist": ",".join(CONTAINERS),
    "codec_whitelist": _CODECS.replace(" ", ","),
}

_MEMORY = 256 * 2**20  # bytes for the decoder, besides what the process and four copies of the file take
_BLOCK_SECONDS = 1.0
_REPORT_SECONDS = 10.0  # of audio that is counted without being sent

# Logged as warnings where a demuxer goes on without what is missing; its errors are such losses, too.
_LOSSES = re.compile(r"CRC mismatch|ended prematurely|partial file")
_RAW = frozenset(("mp3", "aac", "flac"))  # one frame after another; what lies between them is a tag, or lost audio
_SHORT_WAV = b"RIFF.\0\0\0WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x80\x3e\0\0\2\0\x10\0data\x0a\0\0\0" + bytes(10)
_PCM_CONTAINERS = frozenset(("wav", "aiff", "caf", "au"))  # a last packet that is cut says nothing: sizes do
_CUT = {
    "wav": wav_is_cut,
    "ogg": ogg_is_cut,
    "aiff": aiff_is_joined,
    "caf": caf_is_joined,
    "mp4": mp4_is_joined,
}
"""Of each container, what tells why a file is not one whole file; FFmpeg does not."""
_SCALES = {"u1": 2.0**-7, "i2": 2.0**-15, "i4": 2.0**-31}


class RefusedError(Exception):
    """The file is not to be decoded; the message says why, for a person."""


def decode(data: bytes, start: float | None, end: float | None) -> Iterator[tuple[bytes, bytes]]:
    """Decode a file to its end; the messages that answer `open` and each `next`.

    `FORMAT` comes first, then `BLOCK`s of the samples between two times in seconds (float32 [T, C]; at times an empty
    one, with how much has been decoded), then `END`.

    Raises:
        RefusedError: it is no audio file of the formats read, or it is damaged or cut short.
    """
    while size := id3_size(data):
        data = data[size:]
    data = without_flac_tail(data) if data.startswith(b"fLaC") else with_sizes(without_tags(data))
    with av.logging.Capture() as logs:
        try:
            container = _open(data)
        except (av.FFmpegError, ValueError) as error:
            if isinstance(error, MemoryError):
                raise
            raise RefusedError(_not_opened(data, error, [text for *_, text in logs])) from error
        with container:
            if not container.streams.audio:
                raise RefusedError("the file holds no audio, or is cut off before it")
            yield from _Decoding(data, container, logs).messages(start, end)


def _open(data: bytes) -> Any:
    try:
        return av.open(io.BytesIO(data), options=_OPTIONS)
    except av.InvalidDataError:
        if len(data) < 2 or data[0] != 0xFF or data[1] & 0xF6 != 0xF0:
            raise
        return av.open(io.BytesIO(data), format="aac", options=_OPTIONS)  # too short for FFmpeg to be sure


class _Decoding:
    """One file under way.

    Attributes:
        count: samples of each channel decoded so far.
        packets: how many came so far, each a frame of an mp3.
        damage: the first loss: `count`, `packets`, and what it was; None as long as there is none.
    """

    def __init__(self, data: bytes, container: Any, logs: list[tuple[int, str, str]]) -> None:
        self.data, self.container, self.logs = data, container, logs
        self.stream: AudioStream = container.streams.best("audio") or container.streams.audio[0]
        self.kind = CONTAINERS[container.format.name]
        self.rate = self.channels = self.count = 0
        self.damage: tuple[int, int, str] | None = None
        self.packets = 0
        self.last_packet = b""
        self.position: int | None = None  # in the file, after the last packet
        self._note_logs()
        # A short file has been read to its end by now, and where in it the loss is cannot be told.
        self.early, self.damage = self.damage, None
        self.whole: int | None = None  # samples (of an mp3 packets) that there are by what the file says itself
        context = self.stream.codec_context
        if context is None or context.name not in _CODECS.split():  # PyAV opens it without regard to the options
            codec = "of an unknown codec" if context is None else f"in the codec {context.name}, which is not read"
            raise RefusedError(f"the audio in this {self.kind} file is {codec}; convert it to wav or flac first")
        context.thread_count = 1
        if context.name == "flac":
            context.options = {"err_detect": "crccheck+explode"}
        if (self.kind, context.name) == ("caf", "alac"):
            context.options = {"flags2": "skip_manual"}  # FFmpeg would cut the last packet, which is short already

    def messages(self, start: float | None, end: float | None) -> Iterator[tuple[bytes, bytes]]:
        pending: list[np.ndarray] = []
        waiting = reported = 0
        for frame in self._frames():
            if not self.rate:
                self._begin(frame)
                first = 0 if start is None else round(start * self.rate)
                last = None if end is None else round(end * self.rate)
                block = round(_BLOCK_SECONDS * self.rate)
                yield FORMAT, json.dumps({"rate": self.rate, "channels": self.channels}).encode()
            samples = self._samples(frame)
            kept = samples[max(0, first - self.count) : None if last is None else max(0, last - self.count)]
            self.count += len(samples)
            if len(kept):
                pending.append(kept)
                waiting += len(kept)
            if waiting >= block or self.count - reported >= _REPORT_SECONDS * self.rate:
                yield BLOCK, self._block(pending)
                pending, waiting, reported = [], 0, self.count
        if not self.rate:
            self.damage = self.damage or self.early
            raise RefusedError(
                "the audio holds no samples, or the file is cut off before them"
                if self.damage is None
                else self._complaint()
            )
        self._check_whole()
        if pending:
            yield BLOCK, self._block(pending)
        yield END, struct.pack("<Q", self.count)

    def _block(self, pending: list[np.ndarray]) -> bytes:
        return struct.pack("<Q", self.count) + b"".join(piece.tobytes() for piece in pending)

    def _begin(self, frame: AudioFrame) -> None:
        self.rate, self.channels = frame.sample_rate, frame.layout.nb_channels

    def _frames(self) -> Iterator[AudioFrame]:
        """The frames that can be decoded; what cannot is noted in `damage`."""
        packets = self.container.demux(self.stream)
        while True:
            try:
                packet = next(packets)
            except StopIteration:
                return
            except av.EOFError:
                return
            except av.PatchWelcomeError as error:
                raise RefusedError(
                    f"after {self.count / (self.rate or 1):.4g} seconds it goes on with other channels or another "
                    "codec; convert it first"
                ) from error
            except av.FFmpegError as error:
                if isinstance(error, MemoryError):
                    raise
                self._lost(_reason(error))
                return
            self._note_logs()
            if packet.size:
                if self.packets == 0:
                    self.whole = self._declared(packet)
                self._note_gap(packet)
                self.packets += 1
                if self.kind == "mp3" and any(bytes(packet)[at : at + 4] in (b"Xing", b"Info") for at in (13, 21, 36)):
                    continue  # the header of a file that was joined to another
            if packet.is_corrupt and self.kind not in _PCM_CONTAINERS:
                self._lost("a packet is cut short")
            try:
                frames = packet.decode()
            except av.EOFError:
                continue
            except av.FFmpegError as error:  # some decoders give numbers that mean something else
                if isinstance(error, MemoryError):
                    raise
                if not (self.kind in _RAW and is_tag(bytes(packet))):
                    self._lost(_reason(error))
                continue
            if frames and self.kind == "mp3" and packet.size:
                self.last_packet = bytes(packet)
            for frame in frames:
                if frame.samples:
                    self._after_damage(frame)
                    yield frame

    def _after_damage(self, frame: AudioFrame) -> None:
        if self.damage is None:
            return
        if self.count:
            raise RefusedError(self._complaint())  # there is more audio, and some before it is missing
        if self.kind in ("mp3", "aac"):
            self.damage = None  # before the first frame there was something else

    def _note_logs(self) -> None:
        for level, name, text in self.logs:
            if _LOSSES.search(text) or (level <= av.logging.ERROR and name == self.container.format.name):
                self._lost(text.strip())
        self.logs.clear()

    def _note_gap(self, packet: Packet) -> None:
        if self.kind not in _RAW or packet.pos is None:
            return
        skipped = b"" if self.position is None else self.data[self.position : packet.pos]
        if skipped and not is_tag(skipped):
            self._lost(f"{len(skipped)} bytes that are no audio")
        self.position = packet.pos + packet.size

    def _lost(self, what: str) -> None:
        if self.damage is None:
            self.damage = self.count, self.packets, what

    def _samples(self, frame: AudioFrame) -> np.ndarray:
        """float32 [T, C], full scale 1."""
        rate, channels = frame.sample_rate, frame.layout.nb_channels
        if (rate, channels) != (self.rate, self.channels):
            raise RefusedError(
                f"after {self.count / self.rate:.4g} seconds it goes on with {channels} channels at {rate} Hz, and it "
                f"began with {self.channels} at {self.rate} Hz; convert it to one of them first"
            )
        samples = frame.to_ndarray()
        samples = samples.T if frame.format.is_planar else samples.reshape(-1, channels)
        kind = samples.dtype.str[1:]
        if kind == "u1":
            samples = samples.astype(np.float32) - np.float32(128)
        return samples.astype(np.float32) * np.float32(_SCALES.get(kind, 1.0))

    def _declared(self, packet: Packet) -> int | None:
        """How many samples the file says it holds, where it says so and a writer knew it; None elsewhere."""
        stream, pcm = self.stream, self.stream.codec_context.name.startswith("pcm_")
        match self.kind:
            case "mp3":
                return mp3_frames(self.data[: packet.pos or 0])
            case "au" if self.data[8:12] == b"\xff\xff\xff\xff":
                return None
            case "caf" if pcm:
                return stream.frames or None
            case "flac" | "aiff" | "au" | "caf" if stream.duration and stream.time_base:
                return int(stream.duration * stream.time_base * stream.codec_context.sample_rate)
        return None

    def _check_whole(self) -> None:
        """Check that the whole file was decoded.

        Raises:
            RefusedError: it is not.
        """
        self._note_logs()
        mp3 = self.kind == "mp3"
        found = self.packets if mp3 else self.count
        if self.damage is None and self.early is not None:
            self._lost(self.early[-1])
        if self.damage is not None:
            samples, packets, _ = self.damage
            found = packets if mp3 else samples
            # An mp3 with more frames than its header tells of was joined, and nothing tells of the second part's.
            if self.whole is None or found < self.whole or (mp3 and found > self.whole + 1):
                raise RefusedError(self._complaint())
        seconds = f"{self.count / self.rate:.4g} seconds"
        # Some writers count an mp3's header as a frame.
        if self.whole is not None and found < self.whole - mp3:
            told = self.whole / self.rate * (self.stream.codec_context.frame_size if mp3 else 1)
            unit = "frames" if mp3 else "samples"
            raise RefusedError(
                f"the file is truncated: its header tells of {told:.4g} seconds ({self.whole} {unit}), {seconds} "
                f"({found} {unit}) are there"
            )
        cut = {**_CUT, "mp3": self._mp3_is_cut}.get(self.kind)
        reason = cut(self.data) if cut is not None else None
        if reason is not None:
            raise RefusedError(f"the file is damaged or truncated: {reason}; {seconds} of it can be read")

    def _mp3_is_cut(self, data: bytes) -> str | None:
        whole = self.whole is not None and self.packets == self.whole + 1
        cut = mp3_frame_size(self.last_packet) > len(self.last_packet)
        return "it ends within a frame" if cut and not whole else None

    def _complaint(self) -> str:
        assert self.damage is not None
        samples, _, what = self.damage
        readable = f"{samples / self.rate:.4g} seconds" if self.rate else "nothing"
        return f"the file is damaged or truncated: {readable} can be read, then comes what cannot ({what})"


def _not_opened(data: bytes, error: Exception, logs: list[str]) -> str:
    if any("moov atom not found" in text for text in logs) and data[4:8] == b"ftyp":
        return "the file is truncated: nothing of it can be read, since its index (moov), which comes last, is missing"
    reason = _reason(error)
    reason = "FFmpeg takes it for another format" if "not on whitelist" in reason else reason
    return f"not a readable {FORMATS} file, or a damaged or truncated one ({reason})"


def _reason(error: Exception) -> str:
    log = getattr(error, "log", None)
    return str(log[2]).strip() if log else str(getattr(error, "strerror", None) or error)


def _limit_for_good() -> None:
    """Give up what decoding needs none of; called when everything is imported."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal, meant for the server
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))  # the pipes are all it has


def _limit_for(size: int, cpu_seconds: int, base: int) -> None:
    """Limit what a file of `size` bytes may cost from now on."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    spent = int(usage.ru_utime + usage.ru_stime) + 1
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (spent + cpu_seconds, hard))
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (base + _MEMORY + 4 * size, hard))


def _address_space() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


def _opened(command: dict[str, Any], data: bytes) -> Iterator[tuple[bytes, bytes]]:
    try:
        yield from decode(data, command["start"], command["end"])
    except RefusedError as refused:
        yield REFUSAL, str(refused).encode()
    except MemoryError:
        yield REFUSAL, b"to decode it takes more memory than a file may; convert it to wav or flac first"
    except Exception as error:  # whatever such a file leads to, the next one has nothing to do with it
        yield REFUSAL, f"it cannot be decoded ({_reason(error) or type(error).__name__})".encode()


def main() -> None:
    av.logging.set_level(av.logging.WARNING)
    av.logging.set_skip_repeated(False)  # the same loss in two files is two losses
    commands, replies = sys.stdin.buffer, sys.stdout.buffer
    for data in (_SHORT_WAV, b"no audio"):
        list(_opened({"start": None, "end": None}, data))  # PyAV imports parts of itself when they are first used
    base = _address_space()
    _limit_for_good()
    messages: Iterator[tuple[bytes, bytes]] = iter(())
    while line := commands.readline():
        command = json.loads(line)
        if "size" in command:
            messages = iter(())  # what was under way is given up, before there is another file
            _limit_for(command["size"], command["cpu_seconds"], base)
            messages = _opened(command, commands.read(command["size"]))
        kind, payload = next(messages, (REFUSAL, b"nothing is being decoded"))
        replies.write(MESSAGE.pack(kind, len(payload)) + payload)
        replies.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main()
