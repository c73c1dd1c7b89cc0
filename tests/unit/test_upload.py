"""Every audio file that a phone, a browser or a streaming writer makes is read in full, or refused with the reason."""

from __future__ import annotations

import base64
import io
import random
import re
from typing import Any, cast
from unittest.mock import Mock

import av
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.decoder import Decoder
from handler.errors import RequestError
from handler.upload import Sound, Upload, open_upload
from tests.audio_files import CASES, ID3V1, KINDS, LONGEST_DELAY, Kind, encode, id3_tag, noise, wav

pytestmark = pytest.mark.faults

DECODER = Decoder()
PROPERTY = settings(
    max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)
RIGHT = {
    "cbr_without_info.mp3": (44_100, 2, 107_136),
    "vbr_without_info.mp3": (44_100, 2, 107_136),
    "vbr_with_info.mp3": (44_100, 2, 105_840),
    "joined_twice.mp3": (44_100, 2, 213_167),
    "junk_before_first_frame.mp3": (44_100, 2, 107_136),
    "mpeg25_11khz.mp3": (11_025, 1, 27_648),
    "opus_without_eos.opus": (48_000, 2, 115_848),
    "flac_without_length.flac": (44_100, 2, 105_840),
    "flac_in_ogg.oga": (44_100, 2, 105_840),
    "wav_sizes_zero.wav": (44_100, 1, 22_050),
    "phone_aac.m4a": (44_100, 2, 106_496),
    "adts.aac": (44_100, 2, 107_520),
    "phone_alac.m4a": (44_100, 2, 105_840),
    "browser_opus.webm": (48_000, 2, 115_200),
    "logic.aiff": (44_100, 1, 22_050),
    "apple.caf": (44_100, 1, 22_050),
}
SECOND = {name: encode(kind, noise(48_000, 2), 48_000) for name, kind in KINDS.items()}
PCM = noise(16_000, 1)[0]


def opened(value: Any, max_seconds: float = 10.0, max_bytes: int = 1_000_000) -> Upload:
    return open_upload(value, "melody", max_bytes, 0.02, max_seconds)


def read(value: Any, max_seconds: float = 10.0, **part: float) -> Sound:
    return opened(value, max_seconds).read(DECODER, **part)  # type: ignore[arg-type]


def refusal(value: Any, max_seconds: float = 10.0) -> str:
    with pytest.raises(RequestError) as caught:
        read(value, max_seconds)
    assert caught.value.field == "melody"
    assert len(str(caught.value)) < 300
    return caught.value.message


# ---- what is read


@pytest.mark.parametrize("name", RIGHT)
def test_files_of_phones_browsers_and_streaming_writers_are_read_in_full(name: str) -> None:
    sound = read((CASES / name).read_bytes())
    assert (sound.sample_rate, *sound.wav().shape) == RIGHT[name]
    assert float(sound.wav().abs().max()) > 0.1
    assert sound.seconds == RIGHT[name][2] / RIGHT[name][0]


@PROPERTY
@given(st.sampled_from([*KINDS]), st.floats(0.05, 3.0), st.data())
def test_a_file_of_any_kind_has_its_length_channels_and_rate(name: str, seconds: float, data: st.DataObject) -> None:
    kind = KINDS[name]
    rate, channels = data.draw(st.sampled_from(kind.rates)), data.draw(st.sampled_from(kind.channels))
    samples = noise(round(seconds * rate), channels)
    sound = opened(encode(kind, samples, rate), 12.0, max_bytes=10_000_000).read(DECODER)
    found = sound.wav()
    assert (sound.sample_rate, found.shape[0]) == (rate, channels)
    more = found.shape[1] - samples.shape[1]
    assert more == 0 if kind.exact else -LONGEST_DELAY < more < LONGEST_DELAY
    assert sound.seconds == found.shape[1] / rate


@pytest.mark.parametrize("name", KINDS)
def test_a_part_is_the_same_samples_as_in_the_whole(name: str) -> None:
    whole = read(SECOND[name]).wav()
    part = read(SECOND[name], start=0.3, end=0.7)
    assert torch.equal(part.wav(), whole[:, 14_400:33_600])
    assert part.seconds == whole.shape[1] / 48_000
    assert torch.equal(read(SECOND[name], end=90.0).wav(), whole)


@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize(
    ("container", "codec", "dtype", "shift"),
    [
        ("wav", "pcm_s16le", np.int16, 0),
        ("flac", "flac", np.int16, 0),
        ("wav", "pcm_s24le", np.int32, 8),
        ("wav", "pcm_s32le", np.int32, 0),
    ],
)
def test_whole_numbers_become_what_full_scale_divides_them_to(
    container: str, codec: str, dtype: type, shift: int, channels: int
) -> None:
    bits = np.iinfo(dtype).bits
    numbers = np.random.default_rng(1).integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (channels, 5_000))
    numbers = numbers >> shift << shift
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        stream: Any = file.add_stream(codec, rate=32_000, layout="mono" if channels == 1 else "stereo")
        packed: Any = np.ascontiguousarray(numbers.T).reshape(1, -1).astype(dtype)
        frame = av.AudioFrame.from_ndarray(packed, format=f"s{bits}", layout=stream.layout.name)
        frame.sample_rate, frame.pts = 32_000, 0
        resampler = av.AudioResampler(stream.format, stream.layout, 32_000, frame_size=4_096)
        for piece in [*resampler.resample(frame), *resampler.resample(None)]:
            file.mux(stream.encode(piece))
        file.mux(stream.encode(None))
    expected = numbers.astype(dtype).astype(np.float32) / np.float32(2 ** (bits - 1))
    assert np.array_equal(read(out.getvalue()).wav().numpy(), expected)


@pytest.mark.parametrize("name", ["wav, float", "wav, double", "aifc, float"])
def test_floating_point_keeps_its_samples(name: str) -> None:
    samples = noise(5_000, 2)
    assert np.array_equal(read(encode(KINDS[name], samples, 44_100)).wav().numpy(), samples)


@pytest.mark.parametrize("container", ["mp4", "mov", "webm", "matroska"])
def test_of_a_video_the_sound_is_taken(container: str) -> None:
    out = io.BytesIO()
    with av.open(out, "w", format=container) as file:
        video: Any = file.add_stream("libvpx" if container == "webm" else "libx264", rate=30)
        video.width = video.height = 64
        sound: Any = file.add_stream("libopus" if container == "webm" else "aac", rate=48_000, layout="stereo")
        for number in range(60):
            picture = av.VideoFrame(64, 64, "yuv420p")
            picture.pts = number
            file.mux(video.encode(picture))
        frame = av.AudioFrame.from_ndarray(noise(96_000, 2), format="fltp", layout="stereo")
        frame.sample_rate, frame.pts = 48_000, 0
        size = sound.codec_context.frame_size or 960
        for piece in av.AudioResampler(sound.format, sound.layout, 48_000, frame_size=size).resample(frame):
            file.mux(sound.encode(piece))
        for stream in (video, sound):
            file.mux(stream.encode(None))
    assert abs(read(out.getvalue()).length - 96_000) < LONGEST_DELAY
    assert re.search("truncated", refusal(out.getvalue()[: len(out.getvalue()) * 2 // 3]))


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000, 0xFFFFFFFF - 36])
def test_a_wav_whose_writer_could_not_go_back_is_read_to_its_end(size: int) -> None:
    data = (PCM * 2**15).astype("<i2").tobytes()
    for riff_size in (0, 0xFFFFFFFF, None):
        assert read(wav(data, size, riff_size=riff_size)).length == 16_000


@pytest.mark.parametrize(
    ("container", "codec", "options"),
    [
        ("aiff", "pcm_s16be", {}),
        ("aiff", "pcm_s24be", {}),
        ("aiff", "pcm_s16le", {}),
        ("aiff", "pcm_f32be", {}),
        ("wav", "pcm_s16le", {"rf64": "always"}),
        ("au", "pcm_s16be", {}),
    ],
)
@pytest.mark.parametrize("layout", ["mono", "stereo"])
def test_a_file_that_was_written_to_a_pipe_is_read_to_its_end(
    container: str, codec: str, options: dict[str, str], layout: str
) -> None:
    class Pipe:
        data = b""

        def write(self, data: bytes) -> int:
            self.data += data
            return len(data)

    pipe, samples = Pipe(), np.zeros((1, 16_000 * (1 if layout == "mono" else 2)), np.int16)
    with av.open(pipe, "w", format=container, options=options) as file:
        stream = cast(av.AudioStream, file.add_stream(codec, rate=16_000, layout=layout))
        frame = av.AudioFrame.from_ndarray(samples, format="s16", layout=layout)
        frame.sample_rate = 16_000
        for part in av.AudioResampler(format=stream.format.name).resample(frame):
            file.mux(stream.encode(part))
    assert read(pipe.data).seconds == 1


def test_a_caf_whose_writer_could_not_go_back_is_read_to_its_end() -> None:
    data = bytearray(SECOND["caf"])
    place = data.index(b"data") + 4
    data[place : place + 8] = b"\xff" * 8
    assert read(data).length == 48_000


@pytest.mark.parametrize("name", ["mp3 with Info", "mp3 without", "aac", "flac", "flac to a pipe"])
@pytest.mark.parametrize("size", [3_000, 300_000, 700_000])
def test_tags_with_pictures_are_no_audio(name: str, size: int) -> None:
    plain = read(SECOND[name])
    tagged = read(id3_tag(random.Random(1).randbytes(size)) + SECOND[name])
    assert torch.equal(tagged.wav(), plain.wav())


@pytest.mark.parametrize("name", ["mp3 with Info", "mp3 without", "aac"])
@pytest.mark.parametrize(
    "between", [b"", ID3V1, id3_tag(bytes(2_000)), ID3V1 + id3_tag(random.Random(2).randbytes(90_000))]
)
def test_joined_files_are_read_to_the_end_of_the_last(name: str, between: bytes) -> None:
    one = read(SECOND[name]).length
    joined = read(SECOND[name] + between + SECOND[name] + ID3V1)
    assert abs(joined.length - 2 * one) < LONGEST_DELAY


@pytest.mark.parametrize("name", ["mp3 with Info", "mp3 without", "aac"])
def test_joined_files_that_are_cut_in_the_last_are_refused(name: str) -> None:
    joined = SECOND[name] * 2
    for cut in (len(joined) * 3 // 4 + 1, len(joined) * 5 // 6 + 7, len(joined) - 100):
        assert re.search("truncated", refusal(joined[:cut]))


@pytest.mark.parametrize("name", ["opus", "vorbis", "flac in ogg"])
def test_a_chained_ogg_is_read_to_the_end_of_the_last(name: str) -> None:
    one = read(SECOND[name]).length
    assert abs(read(SECOND[name] * 2).length - 2 * one) <= 1_024


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (SECOND["mp3 without"], encode(KINDS["mp3 without"], noise(44_100, 2), 44_100)),
        (SECOND["mp3 without"], encode(KINDS["mp3 without"], noise(48_000, 1), 48_000)),
        (SECOND["opus"], encode(KINDS["opus"], noise(48_000, 1), 48_000)),
        (SECOND["vorbis"], encode(KINDS["vorbis"], noise(44_100, 2), 44_100)),
        (SECOND["flac in ogg"], encode(KINDS["flac in ogg"], noise(48_000, 1), 48_000)),
    ],
)
def test_a_file_that_changes_its_form_is_refused_clearly(first: bytes, second: bytes) -> None:
    assert re.search(r"after .* seconds it goes on with .*; convert it", refusal(first + second))


def test_what_follows_a_whole_file_is_ignored() -> None:
    for name in ("wav, 16 bits", "aiff", "flac", "opus", "mp3 with Info"):
        for rest in (b"<html>no audio</html>" * 20, bytes(500)):
            assert read(SECOND[name] + rest).length >= 48_000, name


def test_base64_and_data_urls_are_the_file() -> None:
    data = encode(KINDS["flac"], noise(3_001, 2), 44_100)
    text = base64.b64encode(data).decode()
    assert "+" in text
    assert "/" in text
    lines = "\r\n".join(text[i : i + 76] for i in range(0, len(text), 76))
    safe = base64.urlsafe_b64encode(data).decode()
    for value in (
        text,
        text.encode(),
        lines,
        safe,
        text.rstrip("="),
        safe.rstrip("="),
        "data:audio/flac;base64," + text,
        "data:audio/webm;codecs=opus;base64," + safe.rstrip("="),
        "DATA:;base64," + text.replace("=", "%3D").replace("+", "%2B").replace("/", "%2F"),
        bytearray(data),
    ):
        assert opened(value).data == data


def test_base64_in_a_form_that_is_not_encoded_is_the_same_file() -> None:
    text = base64.b64encode(wav(bytes(range(256)) * 100)).decode()
    assert "+" in text
    expected = opened(text).data
    lines = "\n ".join(text[first : first + 76] for first in range(0, len(text), 76))
    for form in (text.replace("+", " "), lines, f"data:audio/wav;base64,{text.replace('+', ' ')}", f" {text}\n"):
        assert opened(form).data == expected


def test_silence_is_audio_like_any_other() -> None:
    assert not read(encode(KINDS["flac"], np.zeros((1, 32_000), np.float32), 32_000)).wav().any()


def test_audio_is_converted_while_it_is_read() -> None:
    sound = opened(SECOND["wav, 16 bits"]).read(DECODER, 32_000, 1)
    assert (sound.sample_rate, *sound.wav().shape, sound.seconds) == (32_000, 1, 32_000, 1.0)


# ---- what is refused


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        (b"", "empty"),
        ("", "empty"),
        ("data:audio/wav;base64", "empty"),
        ("not base64!", "not valid base64"),
        ("@song.mp3", "upload it .-F melody=@song.mp3"),
        ("🎵", "not valid base64"),
        ("AAAAA", "not valid base64"),
        ("A" * 2_000_004, "at most 1000000 bytes"),
        (bytes(1_000_001), "at most 1000000 bytes, not 1000001"),
        (b"\xff" * 2_000_001, "at most 1000000 bytes"),
        *(
            (link, "links are not fetched; send the file")
            for link in (
                "https://example.org/song.mp3",
                b"http://example.org/song.mp3",
                "s3://bucket/song.wav",
                " FILE:///etc/passwd",
                "ftp://example.org/a",
                "gs://b/c.flac",
            )
        ),
    ],
)
def test_what_is_no_file_is_refused_at_once(value: Any, complaint: str) -> None:
    with pytest.raises(RequestError, match=complaint) as caught:
        opened(value)
    assert caught.value.field == "melody"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    "data",
    [
        b"\x00" * 4096,
        b"<html>no audio h\xe9re</html>",
        b"<!doctype html><html><body>404 not found</body></html>",
        b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(200),
        b"\xff\xfb" + bytes(2000),
        b"\x89PNG\r\n\x1a\n" + bytes(200),
        b"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nfile:///etc/passwd\n\xe9",
        b"ffconcat version 1.0\nfile /etc/passwd\n\xe9",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'>\xe9</MPD>",
        b"1\n00:00:01,000 --> 00:00:02,000\nh\xe9\n",
        b"v=0\r\no=- 0 0 IN IP4 127.0.0.1\r\nm=audio 5004 RTP/AVP 0\r\n\xe9",
        wav(bytes(200))[:40],
    ],
)
def test_what_is_no_audio_is_refused(data: bytes) -> None:
    assert re.search("not a readable wav, flac, mp3, ogg", refusal(data))


@pytest.mark.parametrize(
    ("data", "complaint"),
    [
        (wav(b""), "no samples"),
        (wav(bytes(2)), "at least 0.02 seconds long, not 6.25e-05"),
        (wav(b"", 2 * 48_000 * 36_000, sample_rate=48_000), "no samples"),
        (wav(bytes(16_000), 32_000), "truncated: its header tells of 32000 bytes, 16000 are there; 0.5 seconds"),
        (wav(bytes(200), sample_rate=1), "sample rate must be from 8000 to 192000 Hz"),
        (wav(bytes(200), sample_rate=1_000_000), "sample rate must be from 8000 to 192000 Hz"),
        (wav(bytes(200), sample_rate=44_101), "a multiple of 25"),
        (wav(bytes(90_000), channels=9), "channels, not 9"),
        (wav(bytes(400 * 200), channels=200), "channels, not 200|not a readable"),
        (
            wav(np.full(1000, np.nan, "<f4").tobytes())
            .replace(b"\x10\0data", b"\x20\0data")
            .replace(b"\1\0\1\0", b"\3\0\1\0")
            .replace(b"\2\0\x20\0", b"\4\0\x20\0"),
            "not finite",
        ),
    ],
)
def test_a_file_that_cannot_be_taken_is_refused(data: bytes, complaint: str) -> None:
    assert re.search(complaint, refusal(data))


@pytest.mark.parametrize(
    "behind",
    [wav(bytes(8_000)), b"data" + (8_000).to_bytes(4, "little") + bytes(8_000), bytes(range(1, 256)) * 40],
    ids=["another file", "another data chunk", "bytes that are no chunk"],
)
def test_audio_behind_a_wavs_samples_is_not_dropped(behind: bytes) -> None:
    complaint = refusal(wav(bytes(32_000)) + behind)
    assert re.search(r"\d+ bytes follow the samples that its header tells of; [\d.]+ seconds of it can", complaint)


@pytest.mark.parametrize(
    "behind", [b"LIST\4\0\0\0abcd", bytes(5000), b"x" * 100], ids=["a chunk", "zeros", "a little junk"]
)
def test_what_other_programs_put_behind_a_wavs_samples_is_no_audio(behind: bytes) -> None:
    assert read(wav(bytes(32_000)) + behind).seconds == 1


@pytest.mark.parametrize("name", ["logic.aiff", "apple.caf", "phone_aac.m4a", "phone_alac.m4a"])
def test_a_second_file_behind_the_first_is_not_dropped(name: str) -> None:
    data = (CASES / name).read_bytes()
    assert "another file follows in it" in refusal(data + data)


@pytest.mark.parametrize("tail", [b"TAG" + bytes(125), bytes(500), bytes(10)], ids=["a tag", "zeros", "ten zeros"])
def test_what_other_programs_put_behind_a_flac_is_no_audio(tail: bytes) -> None:
    data = (CASES / "flac_without_length.flac").read_bytes()
    assert read(data + tail).seconds == read(data).seconds


def test_a_joined_mp3_may_have_several_tags_with_pictures() -> None:
    tag = b"ID3\3\0\0\0\0\0\x0a" + b"x" * 10
    picture = b"ID3\3\0\0\0\0\x0f\x50" + b"\xff\xfb\x90\x64" * 500
    mp3 = (CASES / "cbr_without_info.mp3").read_bytes()
    assert read(tag + picture + mp3 + picture + mp3).seconds == pytest.approx(2 * read(mp3).seconds, abs=0.03)


@pytest.mark.parametrize(
    "link",
    [
        "https://example.org/é.mp3",
        "blob:https://example.org/5",
        "//cdn.example.org/song.mp3",
        "www.example.org/song.mp3",
        '"http://example.org/song.mp3"',
        "<s3://bucket/song.wav>",
    ],
)
def test_any_kind_of_link_is_told_to_be_one(link: str) -> None:
    assert "links are not fetched; send the file" in refusal(link)


@pytest.mark.parametrize("name", ["song.mp3", "@song.mp3", "my songs/é.flac"])
def test_a_files_name_is_told_to_be_no_file(name: str) -> None:
    assert "is a file's name; send the file itself" in refusal(name)


def test_a_codec_that_is_not_listed_is_not_decoded() -> None:
    data = encode(Kind("wav", "adpcm_yamaha", channels=(1,)), noise(24_000, 1), 8_000)
    assert "in the codec adpcm_yamaha, which is not read" in refusal(data)


@pytest.mark.parametrize(
    ("level", "complaint"),
    [
        (np.nan, "not finite"),
        (-np.inf, "not finite"),
        (1e30, "samples of 1e\\+30, where full scale is 1"),
        (-101, "100"),
    ],
)
def test_samples_that_are_no_audio_are_refused(level: float, complaint: str) -> None:
    samples = np.zeros((2, 30_000), np.float32)
    samples[1, 20_000] = level
    assert re.search(complaint, refusal(encode(KINDS["wav, float"], samples, 32_000)))


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if 48_000 in kind.rates and 2 in kind.channels])
def test_a_file_longer_than_the_bound_is_refused(name: str) -> None:
    assert re.search("at most 0.5 seconds long, and it is longer", refusal(SECOND[name], max_seconds=0.5))


def test_a_file_beyond_the_bound_is_decoded_no_further(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Mock(side_effect=Decoder.next_message)
    monkeypatch.setattr(Decoder, "next_message", lambda decoder: blocks(decoder))
    for name in ("flac", "mp3 without", "opus"):
        rate = 8_000 if name != "opus" else 48_000
        long = encode(KINDS[name], np.zeros((1, 900 * rate), np.float32), rate)
        blocks.reset_mock()
        assert "at most 10 seconds long" in refusal(long)
        assert blocks.call_count < 15


def test_many_channels_at_a_high_rate_count_for_more() -> None:
    data = encode(KINDS["flac"], np.zeros((6, 192_000), np.float32), 192_000)
    assert "with 6 channels at 192000 Hz, the audio must be at most 0.8333 seconds" in refusal(data)


# ---- what is cut or damaged


def cuts(data: bytes) -> list[int]:
    chosen = random.Random(len(data))
    return sorted({chosen.randrange(64, len(data) * 97 // 100) for _ in range(12)} | {len(data) // 2 & ~4095})


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if not kind.open_ended])
def test_a_file_that_is_cut_is_refused_or_whole_up_to_there(name: str) -> None:
    """A cut between two pages or fragments that nothing counts makes a shorter file, as a recorder that stops does."""
    taken = 0
    for cut in cuts(SECOND[name]):
        try:
            sound = read(SECOND[name][:cut])
        except RequestError as error:
            complaint = error.message
        else:
            taken += 1
            assert sound.length < 48_000
            continue
        assert re.search("truncated|at least|no samples|no audio|unknown codec", complaint)
    assert taken <= 1


def test_a_cut_file_s_message_says_how_much_can_be_read() -> None:
    for name in (
        "wav, 16 bits",
        "aiff",
        "flac",
        "mp3 with Info",
        "mp3 without",
        "aac",
        "m4a, index first",
        "mkv, flac",
    ):
        data = SECOND[name]
        message = refusal(data[: len(data) // 2 + 3])
        seconds = re.search(r"([\d.]+) seconds (of it can be read|can be read|\(\d+ \w+\) are there)", message)
        assert seconds is not None, message
        assert 0.3 < float(seconds[1]) < 0.6, message


@pytest.mark.parametrize("name", [name for name, kind in KINDS.items() if kind.checked])
@pytest.mark.parametrize("how", ["overwritten", "cut out", "put in"])
def test_a_file_that_is_damaged_in_the_middle_is_not_taken_for_a_shorter_one(name: str, how: str) -> None:
    data, chosen = SECOND[name], random.Random(3)
    if name == "flac in ogg" or "mp4" in name or "mkv" in name:
        how = "overwritten"
    for place in (len(data) // 3, len(data) // 2, len(data) * 2 // 3):
        junk = chosen.randbytes(1_500)
        damaged = {
            "overwritten": data[:place] + junk + data[place + 1_500 :],
            "cut out": data[:place] + data[place + 1_500 :],
            "put in": data[:place] + junk + data[place:],
        }[how]
        try:
            found = read(damaged).length
        except RequestError as error:
            complaint = error.message
        else:
            assert found >= read(data).length - 1_200  # garbage can look like a frame
            continue
        assert re.search("damaged|truncated|cannot be decoded", complaint)
