"""Audio files of every kind that is read, made for tests."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

CASES = Path(__file__).parent / "cases" / "audio"

Samples = NDArray[np.float32]


class _Pipe:
    """A file that cannot seek, as a recorder's that writes to a pipe."""

    def __init__(self) -> None:
        self.data = bytearray()

    def write(self, data: bytes) -> int:
        self.data += data
        return len(data)


@dataclass(frozen=True)
class Kind:
    """How a file is made.

    Attributes:
        container, codec: FFmpeg's names.
        exact: whether decoding gives the very number of samples; else a few more may come, of the codec's delay.
        open_ended: the file does not say how long it is, and has no structure to tell a cut by either.
        checked: damage in the middle shows, by structure or by checksums.
        pipe: the writer cannot go back to complete a header.
        index_first: the mp4's index is moved before the audio.
        channels: what the codec can encode.
        rates: the sample rates the codec can encode.
    """

    container: str
    codec: str
    exact: bool = True
    open_ended: bool = False
    checked: bool = False
    pipe: bool = False
    index_first: bool = False
    container_options: Mapping[str, str] = field(default_factory=dict)
    codec_options: Mapping[str, str] = field(default_factory=dict)
    channels: tuple[int, ...] = (1, 2, 6)
    rates: tuple[int, ...] = (8_000, 22_050, 44_100, 48_000)


_MP3 = {"channels": (1, 2), "rates": (8_000, 11_025, 16_000, 22_050, 32_000, 44_100, 48_000), "checked": True}
_NO_XING = {"write_xing": "0", "id3v2_version": "0"}
_OPUS = {"rates": (48_000,), "checked": True}
_VORBIS = {"channels": (2,), "codec_options": {"strict": "-2"}, "checked": True}
_FRAGMENTS = {"movflags": "frag_keyframe+empty_moov", "frag_duration": "500000"}

KINDS: dict[str, Kind] = {
    "wav, 8 bits": Kind("wav", "pcm_u8"),
    "wav, 16 bits": Kind("wav", "pcm_s16le"),
    "wav, 24 bits": Kind("wav", "pcm_s24le"),
    "wav, 32 bits": Kind("wav", "pcm_s32le"),
    "wav, float": Kind("wav", "pcm_f32le"),
    "wav, double": Kind("wav", "pcm_f64le"),
    "wav, A-law": Kind("wav", "pcm_alaw"),
    "wav, mu-law": Kind("wav", "pcm_mulaw"),
    "wav, ADPCM": Kind("wav", "adpcm_ms", exact=False, channels=(1, 2)),
    "wav, IMA ADPCM": Kind("wav", "adpcm_ima_wav", exact=False, channels=(1, 2)),
    "wav to a pipe": Kind("wav", "pcm_s16le", pipe=True, open_ended=True),
    "rf64": Kind("wav", "pcm_s16le", container_options={"rf64": "always"}),
    "aiff": Kind("aiff", "pcm_s16be"),
    "aifc, float": Kind("aiff", "pcm_f32be"),
    "caf": Kind("caf", "pcm_s16be"),
    "caf, ALAC": Kind("caf", "alac"),
    "au": Kind("au", "pcm_s16be"),
    "au to a pipe": Kind("au", "pcm_s16be", pipe=True, open_ended=True),
    "flac": Kind("flac", "flac", checked=True),
    "flac to a pipe": Kind("flac", "flac", pipe=True, checked=True),
    "flac in ogg": Kind("ogg", "flac", checked=True),
    "mp3 with Info": Kind("mp3", "libmp3lame", **_MP3),  # type: ignore[arg-type]
    "mp3 without": Kind("mp3", "libmp3lame", exact=False, container_options=_NO_XING, **_MP3),  # type: ignore[arg-type]
    "mp3, VBR, without": Kind(
        "mp3",
        "libmp3lame",
        exact=False,
        container_options={"write_xing": "0"},
        codec_options={"q": "4"},
        **_MP3,  # type: ignore[arg-type]
    ),
    "opus": Kind("ogg", "libopus", **_OPUS),  # type: ignore[arg-type]
    "vorbis": Kind("ogg", "vorbis", exact=False, **_VORBIS),  # type: ignore[arg-type]
    "aac": Kind("adts", "aac", exact=False),
    "m4a": Kind("ipod", "aac", exact=False, checked=True),
    "m4a, index first": Kind("ipod", "aac", exact=False, index_first=True, checked=True),
    "m4a in fragments": Kind("mp4", "aac", exact=False, container_options=_FRAGMENTS, checked=True),
    "m4a, ALAC": Kind("ipod", "alac"),
    "mp4, Opus": Kind("mp4", "libopus", exact=False, rates=(48_000,)),
    "mp4, flac": Kind("mp4", "flac", checked=True),
    "mov, 16 bits": Kind("mov", "pcm_s16le"),
    "webm, Opus": Kind("webm", "libopus", **_OPUS),  # type: ignore[arg-type]
    "webm of a browser": Kind("webm", "libopus", pipe=True, container_options={"live": "1"}, **_OPUS),  # type: ignore[arg-type]
    "webm, Vorbis": Kind("webm", "vorbis", exact=False, **_VORBIS),  # type: ignore[arg-type]
    "mkv, AAC": Kind("matroska", "aac", exact=False),
    "mkv, flac": Kind("matroska", "flac", checked=True),
}

LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}
LONGEST_DELAY = 4_096  # samples: of a codec's delay and padding


def noise(samples: int, channels: int = 2) -> Samples:
    """Something of every frequency, `[C, T]`, so that no encoder makes little of it."""
    return (0.1 * np.random.default_rng(samples).standard_normal((channels, samples))).astype(np.float32)


def encode(kind: Kind, samples: Samples, sample_rate: int) -> bytes:
    """A file of a kind with samples `[C, T]`."""
    out = _Pipe() if kind.pipe else io.BytesIO()
    layout = LAYOUTS[len(samples)]
    with av.open(out, "w", format=kind.container, options=dict(kind.container_options)) as container:
        options = dict(kind.codec_options)
        stream: Any = container.add_stream(kind.codec, rate=sample_rate, layout=layout, options=options)
        stream.codec_context.open()
        frame = av.AudioFrame.from_ndarray(samples, format="fltp", layout=layout)
        frame.sample_rate, frame.pts = sample_rate, 0
        size = stream.codec_context.frame_size or 1024
        resampler = av.AudioResampler(stream.format, stream.layout, sample_rate, frame_size=size)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            container.mux(stream.encode(piece))
        container.mux(stream.encode(None))
    data = bytes(out.data) if isinstance(out, _Pipe) else out.getvalue()
    return _index_first(data) if kind.index_first else data


def _index_first(data: bytes) -> bytes:
    atoms, place = dict[bytes, bytes](), 0
    while place < len(data):
        size = int.from_bytes(data[place : place + 4], "big")
        atoms[data[place + 4 : place + 8]] = data[place : place + size]
        place += size
    moov = bytearray(atoms.pop(b"moov"))
    table = moov.index(b"stco")
    for number in range(int.from_bytes(moov[table + 8 : table + 12], "big")):
        entry = slice(table + 12 + 4 * number, table + 16 + 4 * number)
        moov[entry] = (int.from_bytes(moov[entry], "big") + len(moov)).to_bytes(4, "big")
    return b"".join(bytes(moov) + atom if name == b"mdat" else atom for name, atom in atoms.items())


def id3_tag(picture: bytes) -> bytes:
    """An ID3v2.3 tag with a picture."""
    frame = b"APIC" + len(picture).to_bytes(4, "big") + b"\0\0" + picture
    size = bytes(len(frame) >> shift & 127 for shift in (21, 14, 7, 0))
    return b"ID3\3\0\0" + size + frame


ID3V1 = b"TAG" + b"a title".ljust(125, b"\0")


def wav(
    data: bytes, size: int | None = None, sample_rate: int = 16_000, channels: int = 1, riff_size: int | None = None
) -> bytes:
    """A wav of 16 bits whose header tells of `size` bytes."""
    size = len(data) if size is None else size
    riff_size = (36 + size) & 0xFFFFFFFF if riff_size is None else riff_size
    head = [b"RIFF", riff_size.to_bytes(4, "little"), b"WAVEfmt ", (16).to_bytes(4, "little"), b"\1\0"]
    head += [channels.to_bytes(2, "little"), sample_rate.to_bytes(4, "little")]
    head += [(sample_rate * channels * 2 & 0xFFFFFFFF).to_bytes(4, "little"), (channels * 2).to_bytes(2, "little")]
    return b"".join([*head, b"\x10\0data", (size & 0xFFFFFFFF).to_bytes(4, "little"), data])
