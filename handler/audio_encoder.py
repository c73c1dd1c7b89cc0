"""Audio files: written by FFmpeg (PyAV), whole or while their audio is made.

A waveform is a float32 tensor of shape [C, T] with values nominally in [-1, 1]; a sample rate is in Hz.
"""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass
from typing import Protocol, cast

import av
import numpy as np
from torch import Tensor

from handler.audio import to_int16
from handler.stream_audio import StreamResampler

CONTENT_TYPES = {
    "wav": "audio/wav",
    "flac": "audio/flac",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "opus": "audio/ogg",
    "aac": "audio/aac",
    "pcm": "audio/pcm",
}

OTHER_SAMPLE_RATE = 48_000  # for a rate that a codec does not take; every codec takes this one
OGG_PAGE_MICROSECONDS = 100_000  # FFmpeg's own choice, a second, is long to wait for the first sound
AAC_MIN_SAMPLES = 2048  # three frames; FFmpeg does not recognize an ADTS file of fewer
MAX_WAV_BYTES = 0xFFFF_FFFF - 36  # of samples; the header's sizes have 32 bits
_LAYOUTS = {1: "mono", 2: "stereo"}


class Sink(Protocol):
    """Takes a file's bytes. One that can also seek lets FFmpeg complete the header of an mp3 or flac at the end."""

    def write(self, data: bytes, /) -> int: ...


class _Writer(Protocol):
    """Writes one file from 16-bit samples `[T, C]`."""

    sample_rate: int

    def write(self, pcm: np.ndarray) -> None: ...

    def finish(self) -> None: ...

    def close(self) -> None: ...


class AudioEncoder:
    """Writes one audio file to a sink.

    The bytes depend on the samples and the arguments alone, not on how the samples were cut into pushes. The file
    decodes to the clip's length, with these exceptions:

    * `mp3` to a sink that cannot seek lacks the Info frame that tells players its encoder's delay (1,105 samples):
      that delay is heard as silence at the front, and up to 2 frames of 1,152 samples follow at the end;
    * `aac` (ADTS) has no place for the delay (1,024 samples), whole or streamed; up to 1,023 samples follow at the
      end, and more after a clip of less than 2,048 samples, which is padded to them.

    `wav` and `pcm` are 16-bit little-endian samples. `flac` to a sink that cannot seek lacks its checksum (0, "not
    computed") and tells only the largest frame that there can be. `ogg` and `opus` are both Opus in Ogg, whose stream
    serial number is the seed's low 31 bits, so that files of different seeds can be joined into one.

    A codec that does not take a rate gets 48 kHz: Opus 22.05, 32 and 44.1 kHz. Audio is resampled by the windowed sinc
    of julius and not by FFmpeg: it is the filter that the model's input goes through, and its result does not depend on
    how the audio is cut. A resampled file has `floor(length * to_rate / from_rate)` samples.

    Attributes:
        sample_rate: of the file, in Hz.

    Args:
        sink: where the bytes go.
        audio_format: one of `CONTENT_TYPES`.
        sample_rate: of the audio that will be pushed, in Hz.
        channels: 1 or 2.
        length: samples per channel that will be pushed; the headers of wav and flac tell it from the beginning.
        seed: the request's, for the Ogg serial number.
        to_rate: the wanted rate of the file; None: that of the audio.

    Raises:
        ValueError: for another format or number of channels.
    """

    def __init__(
        self,
        sink: Sink,
        audio_format: str,
        sample_rate: int,
        channels: int,
        length: int,
        seed: int,
        to_rate: int | None = None,
    ) -> None:
        if audio_format not in CONTENT_TYPES:
            raise ValueError(f"no encoder for {audio_format!r}")
        if channels not in _LAYOUTS:
            raise ValueError(f"audio with {channels} channels cannot be written; 1 or 2 can")
        wanted = to_rate or sample_rate
        self._channels = channels
        self._writer: _Writer
        match audio_format:
            case "wav" | "pcm":
                self._writer = _SampleWriter(sink, wanted)
                if audio_format == "wav":
                    sink.write(_wav_header(wanted, channels, length * wanted // sample_rate))
            case "flac":
                self._writer = _FlacWriter(sink, wanted, channels, length * wanted // sample_rate)
            case "mp3":
                self._writer = _Mp3Writer(sink, wanted, channels)
            case "aac":
                self._writer = _AacWriter(sink, wanted, channels)
            case _:
                self._writer = _OpusWriter(sink, wanted, channels, seed)
        self.sample_rate = self._writer.sample_rate
        self._resampler = StreamResampler(sample_rate, self.sample_rate) if self.sample_rate != sample_rate else None

    def push(self, wav: Tensor) -> None:
        """Add samples, float32 `[C, m]` in [-1, 1] (what is outside is cut).

        Raises:
            ValueError: when `C` is not the number of channels of the file.
        """
        if wav.shape[-1] == 0:
            return
        if wav.shape[0] != self._channels:
            raise ValueError(f"a file with {self._channels} channels cannot take audio with {wav.shape[0]}")
        wav = wav.detach().cpu().float()
        self._write(self._resampler.push(wav) if self._resampler else wav)

    def finish(self) -> None:
        """Write the rest of the file; nothing can be pushed after it."""
        if self._resampler:
            self._write(self._resampler.finish())
        self._writer.finish()

    def close(self) -> None:
        """Release FFmpeg's memory at once, also when the file is not finished and never will be."""
        self._writer.close()

    def _write(self, wav: Tensor) -> None:
        for piece in wav.split(self.sample_rate, dim=-1):  # a second at a time, so that memory stays flat
            if piece.shape[-1]:
                self._writer.write(to_int16(piece))


@dataclass(frozen=True, slots=True)
class EncodedAudio:
    """An audio file in memory.

    Attributes:
        data: the file's bytes.
        content_type: its media type.
        sample_rate: of the audio in the file, in Hz.
    """

    data: bytes
    content_type: str
    sample_rate: int


def encode(wav: Tensor, sample_rate: int, audio_format: str, seed: int, to_rate: int | None = None) -> EncodedAudio:
    """Write `[C, T]` as a whole file; the arguments are those of `AudioEncoder`."""
    file = io.BytesIO()
    encoder = AudioEncoder(file, audio_format, sample_rate, wav.shape[0], wav.shape[-1], seed, to_rate)
    encoder.push(wav)
    encoder.finish()
    return EncodedAudio(file.getvalue(), CONTENT_TYPES[audio_format], encoder.sample_rate)


class StreamEncoder:
    """An `AudioEncoder` that gives the bytes as they become final.

    The bytes of all pushes and of `finish`, in order, are one file. It is the file that `encode` makes, but for the
    headers of `mp3` and `flac`.

    Attributes:
        content_type: the file's media type.
        sample_rate: of the file, in Hz.
    """

    def __init__(
        self,
        audio_format: str,
        sample_rate: int,
        channels: int,
        length: int,
        seed: int,
        to_rate: int | None = None,
    ) -> None:
        self._outbox = _Outbox()
        self._encoder = AudioEncoder(self._outbox, audio_format, sample_rate, channels, length, seed, to_rate)
        self.content_type = CONTENT_TYPES[audio_format]
        self.sample_rate = self._encoder.sample_rate

    def push(self, wav: Tensor) -> bytes:
        """Add samples as `AudioEncoder.push` does; the bytes that are final, perhaps none."""
        self._encoder.push(wav)
        return self._outbox.take()

    def finish(self) -> bytes:
        """The rest of the file; nothing can be pushed after it."""
        self._encoder.finish()
        return self._outbox.take()

    def close(self) -> None:
        """Release FFmpeg's memory at once, also when the file is not finished and never will be."""
        self._encoder.close()


class _Outbox:
    """A sink that cannot seek; keeps what is written until it is taken."""

    def __init__(self) -> None:
        self._kept = bytearray()

    def write(self, data: bytes, /) -> int:
        self._kept += data
        return len(data)

    def take(self) -> bytes:
        taken, self._kept = bytes(self._kept), bytearray()
        return taken


def _wav_header(sample_rate: int, channels: int, length: int) -> bytes:
    """The 44 bytes before 16-bit samples. FFmpeg's muxer can tell the length only by seeking back to the header."""
    frame = 2 * channels
    size = min(length * frame, MAX_WAV_BYTES)
    layout = struct.pack("<IHHIIHH", 16, 1, channels, sample_rate, sample_rate * frame, frame, 16)
    return b"RIFF" + struct.pack("<I", 36 + size) + b"WAVEfmt " + layout + b"data" + struct.pack("<I", size)


class _SampleWriter:
    """Writes the samples as they are."""

    def __init__(self, sink: Sink, sample_rate: int) -> None:
        self.sample_rate = sample_rate
        self._sink = sink

    def write(self, pcm: np.ndarray) -> None:
        self._sink.write(pcm.tobytes())

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class _FFmpegWriter:
    """Writes a file by one of FFmpeg's muxers and encoders, each packet at once.

    `bitexact` leaves the libraries' versions and random numbers out of the file. One thread does the work: threads
    would hold packets back.
    """

    def __init__(
        self,
        sink: Sink,
        sample_rate: int,
        channels: int,
        container: str,
        codec: str,
        bit_rate: int | None = None,
        muxer_options: dict[str, str] | None = None,
        codec_options: dict[str, str] | None = None,
    ) -> None:
        rates = av.Codec(codec, "w").audio_rates
        self.sample_rate = sample_rate if rates is None or sample_rate in rates else OTHER_SAMPLE_RATE
        self.samples = 0
        self._closed = False
        self._layout = _LAYOUTS[channels]
        options = {"fflags": "+bitexact", "flush_packets": "1", **(muxer_options or {})}
        self._container = av.open(sink, "w", format=container, options=options)
        options = {"flags": "+bitexact", "threads": "1", **(codec_options or {})}
        stream = self._container.add_stream(codec, rate=self.sample_rate, layout=self._layout, options=options)
        self._stream = cast(av.AudioStream, stream)
        if bit_rate is not None:
            self._stream.bit_rate = bit_rate
        self._stream.codec_context.open()
        self._before_header()
        self._container.start_encoding()

    def _before_header(self) -> None:
        """Change what the encoder has told the muxer, before the muxer writes it."""

    def write(self, pcm: np.ndarray) -> None:
        frame = av.AudioFrame.from_ndarray(pcm.reshape(1, -1), format="s16", layout=self._layout)
        frame.sample_rate = self.sample_rate
        frame.pts = self.samples
        self.samples += len(pcm)
        self._container.mux(self._encode(frame))

    def finish(self) -> None:
        if self.samples:
            # a last mp3 frame without duration is all padding; with it, the Info frame would tell too little
            self._container.mux([packet for packet in self._encode(None) if packet.duration])
        self.close()

    def close(self) -> None:
        self._closed = True
        self._container.close()  # which also ends a cycle of references

    def _encode(self, frame: av.AudioFrame | None) -> list[av.Packet]:
        if self._closed:  # PyAV would crash
            raise ValueError("the file is closed")
        return self._stream.encode(frame)


class _FlacWriter(_FFmpegWriter):
    def __init__(self, sink: Sink, sample_rate: int, channels: int, length: int) -> None:
        self._length = length
        # FFmpeg's default padding after the header, 8 kB, is for editors of tags
        super().__init__(sink, sample_rate, channels, "flac", "flac", muxer_options={"metadata_header_padding": "0"})

    def _before_header(self) -> None:
        # STREAMINFO's number of samples is the low 36 bits of its bytes 10 to 17 (RFC 9639, 8.2); 0 is "unknown"
        context = self._stream.codec_context
        info = bytes(context.extradata or b"")
        fields = int.from_bytes(info[10:18], "big") | (self._length if self._length < 2**36 else 0)
        context.extradata = info[:10] + fields.to_bytes(8, "big") + info[18:]


class _Mp3Writer(_FFmpegWriter):
    """192 kbit/s, constant; 96 below 32 kHz; 64, MPEG-2.5's most, at 8 kHz."""

    def __init__(self, sink: Sink, sample_rate: int, channels: int) -> None:
        bit_rate = 192_000 if sample_rate >= 32_000 else 96_000 if sample_rate >= 16_000 else 64_000
        muxer_options = {"id3v2_version": "0"}  # no tags
        super().__init__(sink, sample_rate, channels, "mp3", "libmp3lame", bit_rate, muxer_options)


class _AacWriter(_FFmpegWriter):
    """About 96 kbit/s a channel, less below 24 kHz."""

    def __init__(self, sink: Sink, sample_rate: int, channels: int) -> None:
        self._channels = channels
        bit_rate = _bit_rate(sample_rate, channels)
        # the default coder, twoloop, takes twice the time and leaves 6 to 20 dB more noise on a chord
        codec_options = {"aac_coder": "fast"}
        super().__init__(sink, sample_rate, channels, "adts", "aac", bit_rate, codec_options=codec_options)

    def finish(self) -> None:
        if 0 < self.samples < AAC_MIN_SAMPLES:
            self.write(np.zeros((AAC_MIN_SAMPLES - self.samples, self._channels), "<i2"))
        super().finish()


class _OpusWriter(_FFmpegWriter):
    """About 96 kbit/s a channel, less below 24 kHz."""

    def __init__(self, sink: Sink, sample_rate: int, channels: int, seed: int) -> None:
        muxer_options = {"serial_offset": str(seed % 2**31), "page_duration": str(OGG_PAGE_MICROSECONDS)}
        bit_rate = _bit_rate(sample_rate, channels)
        super().__init__(sink, sample_rate, channels, "ogg", "libopus", bit_rate, muxer_options)


def _bit_rate(sample_rate: int, channels: int) -> int:
    return min(96_000, 4 * sample_rate) * channels
