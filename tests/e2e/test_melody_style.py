"""Melodies, styles and continuations over HTTP, and the audio of people who mean no good."""

from __future__ import annotations

import base64
import io
import struct
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import psutil
import pytest
import requests
import soundfile

from archive_scripts.pack import pack
from handler.decoder import PROGRAM
from handler.engine.engine import READERS
from tests.audio_files import CASES
from tests.e2e.conftest import GOLDENS, Server, eventually, run_server
from tests.e2e.mixture import mixture
from tests.e2e.test_requests import error_of, samples_of
from tests.goldens.wavs import synth

TIMEOUT = 120
MEBIBYTE = 2**20
STYLE_FIELDS = {"style", "eval_q", "excerpt_length", "ds_factor"}


@pytest.fixture(scope="module")
def wav_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A `melody` and a `style` model."""
    store = tmp_path_factory.mktemp("model-store")
    yield from run_server(
        [
            pack(str(GOLDENS / name), name=name, output=store, hub_dir=GOLDENS / "hub", handler={"max_duration": 40})
            for name in ("melody", "style")
        ]
    )


def song(
    seconds: float, kind: int = 1, sample_rate: int = 32_000, channels: int = 1, file: tuple[str, str] | None = None
) -> bytes:
    container, subtype = file or ("WAV", "PCM_16")
    buffer = io.BytesIO()
    samples = synth(seconds, sample_rate, kind, channels).T.numpy()
    soundfile.write(buffer, samples, sample_rate, format=container, subtype=subtype)
    return buffer.getvalue()


def upload(server: Server, model: str, fields: dict[str, Any], **files: bytes) -> requests.Response:
    return requests.post(server.url(model), data=fields, files=files, timeout=TIMEOUT)


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


SHORT: dict[str, Any] = {"prompt": "happy rock", "duration": 1, "seed": 5}


@pytest.mark.parametrize(("model", "field"), [("melody", "melody"), ("style", "style")])
def test_audio_to_follow_changes_the_music_and_the_same_request_gives_the_same_bytes(
    wav_server: Server, model: str, field: str
) -> None:
    file = song(4)
    first = upload(wav_server, model, SHORT, **{field: file})
    assert len(samples_of(first)) == 32_000
    again = upload(wav_server, model, SHORT, **{field: file})
    in_json = wav_server.post(model, **SHORT, **{field: base64_of(file)})
    in_form = requests.post(wav_server.url(model), data={**SHORT, field: base64_of(file)}, timeout=TIMEOUT)
    assert first.content == again.content == in_json.content == in_form.content
    others = [
        wav_server.post(model, **SHORT),
        upload(wav_server, model, SHORT, **{field: song(4, kind=2)}),
        upload(wav_server, model, {**SHORT, "seed": 6}, **{field: file}),
    ]
    assert len({first.content, *(samples_of(other) is not None and other.content for other in others)}) == 4


@pytest.mark.parametrize(("model", "field"), [("melody", "melody"), ("style", "style")])
@pytest.mark.parametrize(
    ("container", "subtype", "sample_rate", "channels"),
    [
        ("WAV", "FLOAT", 8_000, 1),
        ("WAV", "PCM_24", 96_000, 6),
        ("FLAC", "PCM_16", 44_100, 2),
        ("MP3", "MPEG_LAYER_III", 44_100, 2),
        ("OGG", "VORBIS", 22_050, 1),
        ("OGG", "OPUS", 48_000, 2),
    ],
)
def test_audio_of_any_format_rate_and_channels_is_followed(
    wav_server: Server, model: str, field: str, container: str, subtype: str, sample_rate: int, channels: int
) -> None:
    file = song(3.5, 1, sample_rate, channels, (container, subtype))
    assert len(samples_of(upload(wav_server, model, {**SHORT, "duration": 0.2}, **{field: file}))) == 6_400


@pytest.mark.parametrize("name", [path.name for path in sorted(CASES.iterdir())])
def test_files_of_phones_browsers_and_streaming_writers_are_followed(wav_server: Server, name: str) -> None:
    reply = upload(wav_server, "melody", {**SHORT, "duration": 0.2}, melody=(CASES / name).read_bytes())
    assert len(samples_of(reply)) == 6_400


@pytest.mark.faults
def test_a_decoder_that_is_killed_costs_at_most_its_request(wav_server: Server) -> None:
    [status] = requests.get(f"{wav_server.management}/models/melody", timeout=TIMEOUT).json()
    worker = psutil.Process(status["workers"][0]["pid"])
    expected = upload(wav_server, "melody", SHORT, melody=song(4)).content
    decoders = [each for each in worker.children() if "handler.decoder_process" in each.cmdline()]
    assert decoders
    for decoder in decoders:
        decoder.kill()
    assert upload(wav_server, "melody", SHORT, melody=song(4)).content == expected
    assert worker.is_running()


def test_silence_is_a_melody_and_a_style(wav_server: Server) -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(4 * 32_000), 32_000, format="FLAC")
    for name in ("melody", "style"):
        reply = upload(wav_server, name, SHORT, **{name: buffer.getvalue()})
        assert len(samples_of(reply)) == 32_000


def test_a_song_s_melody_is_followed_from_its_beginning_whatever_comes_later(wav_server: Server) -> None:
    whole = samples_of(upload(wav_server, "melody", SHORT, melody=song(70, sample_rate=16_000)))
    first_part = samples_of(upload(wav_server, "melody", SHORT, melody=song(40, sample_rate=16_000)))
    assert np.array_equal(whole, first_part)


def test_a_long_clip_follows_its_melody_through_its_windows(wav_server: Server) -> None:
    fields = {"duration": 31, "seed": 2, "format": "mp3"}
    assert len(samples_of(upload(wav_server, "melody", fields, melody=song(12)))) == 31 * 32_000


def test_a_clip_is_continued_along_a_melody(wav_server: Server) -> None:
    fields = {"duration": 2, "seed": 4, "continuation_start": 0.5, "continuation_end": 1.25}
    clip, melody = song(2, kind=2), song(4)
    both = upload(wav_server, "melody", fields, continuation=clip, melody=melody)
    alone = upload(wav_server, "melody", fields, continuation=clip)
    assert len(samples_of(both)) == len(samples_of(alone)) == 64_000
    assert both.content == upload(wav_server, "melody", fields, continuation=clip, melody=melody).content
    assert both.content != alone.content
    samples, rate = soundfile.read(io.BytesIO(clip), dtype="int16")
    excerpt = io.BytesIO()
    soundfile.write(excerpt, samples[16_000:40_000], rate, format="WAV", subtype="PCM_16")
    cut = upload(wav_server, "melody", {"duration": 2, "seed": 4}, continuation=excerpt.getvalue())
    assert cut.content == alone.content


def test_a_style_is_looked_at_as_asked(wav_server: Server) -> None:
    file = song(4)
    clips = [
        samples_of(upload(wav_server, "style", {**SHORT, **fields}, style=file)).tobytes()
        for fields in (
            {},
            {"eval_q": 1},
            {"excerpt_length": 1.5},
            {"ds_factor": 5},
            {"cfg_coef_beta": 5},
            {"excerpt_length": 3, "ds_factor": 1},
        )
    ]
    assert len(set(clips)) == len(clips)


def test_every_request_of_a_mixture_with_melodies_gets_the_bytes_it_gets_alone(wav_server: Server) -> None:
    bodies = mixture(16, longest=4, melodies=True)
    together = wav_server.post_together(*bodies, model="melody")
    assert [reply.status_code for reply in together] == [200] * len(bodies)
    for body, reply in zip(bodies, together, strict=True):
        assert wav_server.post("melody", **body).content == reply.content, body


@pytest.mark.parametrize("name", ["melody", "style"])
def test_a_model_lists_the_fields_it_takes_with_their_bounds(wav_server: Server, name: str) -> None:
    description = requests.get(wav_server.url(name), timeout=TIMEOUT).json()
    fields = description["fields"]
    assert description["conditioners"] == ["self_wav", "description"]
    assert (description["window"], description["max_duration"], description["frame_rate"]) == (30, 40, 50)
    assert (description["device"], description["dtype"]) == ("cpu", "float32")
    assert {"melody", *STYLE_FIELDS} & set(fields) == ({"melody"} if name == "melody" else STYLE_FIELDS)
    assert (fields[name]["max_bytes"], fields[name]["max_seconds"]) == (32 * MEBIBYTE, 600)
    if name == "style":
        assert (fields["ds_factor"]["minimum"], fields["excerpt_length"]["maximum"]) == (1, 30)


def test_a_field_of_another_model_is_an_error_that_names_the_models_that_take_it(
    server: Server, wav_server: Server
) -> None:
    file = song(1)
    for where, model, field, variants in [
        (server, "tiny", "melody", "melody, melody-large, stereo-melody, stereo-melody-large"),
        (server, "tiny", "style", "style"),
        (wav_server, "melody", "style", "style"),
        (wav_server, "style", "melody", "melody-large"),
    ]:
        response = upload(where, model, {"duration": 1}, **{field: file})
        assert response.status_code == 400
        error = error_of(response)
        assert error["field"] == field
        assert variants in error["message"]
    for where, model, field in [(server, "tiny", "eval_q"), (wav_server, "melody", "ds_factor")]:
        assert error_of(where.post(model, **{field: 3}))["field"] == field


@pytest.mark.parametrize(
    ("fields", "field", "complaint"),
    [
        ({"eval_q": 7}, "eval_q", "from 1 to 6, not 7"),
        ({"excerpt_length": 2.5}, "excerpt_length", "does not fit into audio of 2 s"),
        ({}, "excerpt_length", "an excerpt of 3 s does not fit"),
        ({"excerpt_length": 0.001}, "excerpt_length", "at least"),
        ({"excerpt_length": 30, "ds_factor": 2}, "excerpt_length", "512 are the most"),
    ],
)
def test_a_style_that_cannot_be_looked_at_so_is_refused(
    wav_server: Server, fields: dict[str, Any], field: str, complaint: str
) -> None:
    response = upload(wav_server, "style", {**SHORT, **fields}, style=song(2))
    assert response.status_code == 400
    assert error_of(response)["field"] == field
    assert complaint in error_of(response)["message"]


# ---- hostile audio


def wav_header(samples: int, sample_rate: int = 16_000, channels: int = 1) -> bytes:
    size, frame = samples * 2 * channels, 2 * channels
    return (
        b"RIFF"
        + struct.pack("<I", 36 + size & 0xFFFFFFFF)
        + b"WAVEfmt "
        + struct.pack("<IHHIIHH", 16, 1, channels, sample_rate, sample_rate * frame & 0xFFFFFFFF, frame, 16)
        + b"data"
        + struct.pack("<I", size & 0xFFFFFFFF)
    )


def repeated(samples: float, seconds: int, sample_rate: int, container: str, subtype: str, channels: int = 1) -> bytes:
    buffer = io.BytesIO()
    with soundfile.SoundFile(buffer, "w", sample_rate, channels, format=container, subtype=subtype) as file:
        for _ in range(seconds):
            file.write(np.full((sample_rate, channels), samples, "float32"))
    return buffer.getvalue()


def claiming(samples: int) -> bytes:
    """A flac of a second whose header claims more."""
    data = bytearray(song(1, file=("FLAC", "PCM_16")))
    data[18:26] = (int.from_bytes(data[18:26], "big") >> 36 << 36 | samples).to_bytes(8, "big")
    return bytes(data)


def with_garbage() -> bytes:
    data = song(4, file=("MP3", "MPEG_LAYER_III"))
    return data[:9_000] + bytes(range(256)) * 20 + data[14_000:20_000]


HOSTILE: dict[str, Callable[[], bytes]] = {
    "html": lambda: b"<!doctype html><title>404</title>",
    "zip": lambda: b"PK\x03\x04\x14\x00\x00\x00\x08\x00" + bytes(4_000),
    "zeros": lambda: bytes(MEBIBYTE),
    "one-sample": lambda: wav_header(1) + bytes(2),
    "nan": lambda: repeated(np.nan, 4, 16_000, "WAV", "FLOAT"),
    "infinity": lambda: repeated(-np.inf, 4, 16_000, "WAV", "FLOAT"),
    "huge-samples": lambda: repeated(1e38, 4, 16_000, "WAV", "FLOAT"),
    "ten-hours-and-no-data": lambda: wav_header(16_000 * 36_000),
    "truncated": lambda: song(4)[:-9_999],
    "one-hertz": lambda: wav_header(100, 1) + bytes(200),
    "one-megahertz": lambda: wav_header(100_000, 1_000_000) + bytes(200_000),
    "hundred-channels": lambda: wav_header(1_000, 16_000, 100) + bytes(200_000),
    "flac-of-two-hours": lambda: repeated(0, 7_200, 8_000, "FLAC", "PCM_16"),
    "flac-of-eight-channels": lambda: repeated(0, 60, 192_000, "FLAC", "PCM_16", 8),
    "flac-that-claims-2-to-the-36": lambda: claiming(2**36 - 1),
    "flac-that-claims-twenty-seconds": lambda: claiming(32_000 * 20),
    "link": lambda: b"https://example.org/song.mp3",
    "mp3-cut-in-the-middle": lambda: (CASES / "cbr_without_info.mp3").read_bytes()[:20_000],
    "m4a-without-its-index": lambda: (CASES / "phone_aac.m4a").read_bytes()[:30_000],
    "playlist": lambda: b"#EXTM3U\n#EXTINF:9,\nfile:///etc/passwd\n\xe9",
    "ogg-of-twenty-minutes": lambda: repeated(0, 1_200, 8_000, "OGG", "VORBIS"),
    "mp3-of-twenty-minutes": lambda: repeated(0, 1_200, 8_000, "MP3", "MPEG_LAYER_III"),
    "mp3-with-garbage": with_garbage,
}


@pytest.mark.parametrize("kind", HOSTILE)
@pytest.mark.faults
def test_hostile_audio_is_refused_naming_its_field_and_disturbs_nobody(wav_server: Server, kind: str) -> None:
    data = HOSTILE[kind]()
    asked = [("melody", "melody"), ("melody", "continuation"), ("style", "style")]
    with ThreadPoolExecutor(len(asked) + 1) as pool:
        good = pool.submit(wav_server.post, "melody", **SHORT)
        for response, (model, field) in zip(
            pool.map(lambda ask: upload(wav_server, ask[0], {"duration": 30}, **{ask[1]: data}), asked),
            asked,
            strict=True,
        ):
            assert response.status_code == 400, (model, field)
            assert error_of(response)["field"] == field
            assert len(response.content) < 1_000
        assert good.result().content == wav_server.post("melody", **SHORT).content


def test_two_kinds_of_audio_at_once_are_refused(wav_server: Server) -> None:
    for model, field in (("melody", "style"), ("style", "melody")):
        response = upload(wav_server, model, SHORT, melody=song(4), style=song(4))
        assert response.status_code == 400
        assert error_of(response)["field"] == field


@pytest.mark.faults
def test_audio_larger_than_the_bound_is_refused(wav_server: Server) -> None:
    response = upload(wav_server, "melody", {}, melody=wav_header(2**24) + bytes(2**25))
    assert response.status_code == 400
    assert error_of(response)["field"] == "melody"
    assert str(32 * MEBIBYTE) in error_of(response)["message"]


@pytest.mark.faults
def test_hostile_audio_leaves_the_worker_s_memory_as_it_was(wav_server: Server) -> None:
    def sizes() -> tuple[int, list[int]]:
        """Bytes of the worker with its engine, and of each decoder: they start when as many files come at once."""
        [status] = requests.get(f"{wav_server.management}/models/melody", timeout=TIMEOUT).json()
        worker = psutil.Process(status["workers"][0]["pid"])
        rest, decoders = 0, []
        for process in [worker, *worker.children(recursive=True)]:
            if PROGRAM in process.cmdline():
                decoders.append(process.memory_info().rss)
            else:
                rest += process.memory_info().rss
        return rest, decoders

    files = [make() for make in HOSTILE.values()]
    with ThreadPoolExecutor(4) as pool:

        def send(count: int) -> set[int]:
            chosen = [files[number % len(files)] for number in range(count)]
            return {r.status_code for r in pool.map(lambda data: upload(wav_server, "melody", {}, melody=data), chosen)}

        assert send(63) == {400}  # what is set up once is set up
        before, _ = sizes()
        assert send(63) == {400}
        eventually(lambda: sizes()[0] - before < 16 * MEBIBYTE)  # it is given back just after the reply
        _, decoders = sizes()
        assert len(decoders) <= READERS
        assert all(size < 160 * MEBIBYTE for size in decoders)
