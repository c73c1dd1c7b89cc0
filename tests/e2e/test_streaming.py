"""Audio that is sent while it is made."""

from __future__ import annotations

import base64
import http.client
import io
import json
import socket
import time
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import pytest
import requests
import soundfile

from tests.e2e.conftest import TIMEOUT, Server

FORMATS = ["wav", "mp3", "ogg", "opus", "flac", "pcm"]
CLIP: dict[str, Any] = {"prompt": "80s pop", "duration": 4, "seed": 3}
ENDLESS: dict[str, Any] = {"prompt": "80s pop", "duration": 120, "seed": 4}
LAST_CHUNK = b"\r\n0\r\n\r\n"


def events_of(text: str) -> list[dict[str, Any]]:
    """The data of server-sent events, each of which is named by its `type`."""
    events = []
    for block in text.split("\n\n")[:-1]:
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


@pytest.mark.parametrize("audio_format", FORMATS)
def test_every_format_comes_in_pieces_that_are_one_file(server: Server, audio_format: str) -> None:
    response = server.stream(**CLIP, format=audio_format)
    pieces = list(response.iter_content(None))
    assert response.status_code == 200
    assert len(pieces) >= 4
    assert (response.headers["x-duration"], response.headers["x-seed"]) == ("4.0", "3")
    rate = int(response.headers["x-sample-rate"])
    file = b"".join(pieces)
    if audio_format == "pcm":
        samples = np.frombuffer(file, "<i2")
    else:
        samples, decoded_rate = soundfile.read(io.BytesIO(file), dtype="int16")
        assert decoded_rate == rate
    encoder_delay = 0.1 * rate if audio_format == "mp3" else 0
    assert 4 * rate <= len(samples) <= 4 * rate + encoder_delay
    assert np.abs(samples).max() > 100


def test_audio_comes_before_the_clip_is_finished(server: Server) -> None:
    response = server.stream("tiny", "endless", **ENDLESS, format="pcm")
    first = next(response.iter_content(2))
    server.cancel("endless")  # which an unfinished clip alone can be
    rest = response.content
    assert len(first + rest) < 2 * 32_000 * float(response.headers["x-duration"])


def test_a_streamed_wav_tells_its_length_at_once(server: Server) -> None:
    response = server.stream("tiny", "endless-wav", **ENDLESS)
    header = response.raw.read(44)
    server.cancel("endless-wav")
    assert header[:4] == b"RIFF"
    assert int.from_bytes(header[40:44], "little") == 120 * 32_000 * 2
    response.close()


@pytest.mark.parametrize("normalization", ["none", "clip"])
@pytest.mark.parametrize(
    ("audio_format", "sample_rate"), [("pcm", None), ("wav", 22_050), ("aac", 24_000), ("ogg", None)]
)
def test_a_stream_is_the_file_of_the_whole_clip(
    server: Server, normalization: str, audio_format: str, sample_rate: int | None
) -> None:
    fields = {**CLIP, "format": audio_format, "sample_rate": sample_rate, "normalization": normalization}
    assert server.stream(**fields).content == server.post(**fields).content


def test_a_stream_has_the_same_bytes_each_time_alone_or_together(server: Server) -> None:
    bodies = [{**CLIP, "duration": 2, "stream": True, "format": audio_format} for audio_format in FORMATS]
    bodies += [{**body, "stream_format": "sse", "seed": 9} for body in bodies]
    alone = [server.post(**body).content for body in bodies]
    for _ in range(2):
        assert [response.content for response in server.post_together(*bodies)] == alone


def test_events_tell_of_progress_and_hold_the_streamed_file(server: Server) -> None:
    fields = {**CLIP, "format": "ogg"}
    file = server.stream(**fields)
    response = server.stream(**fields, stream_format="sse")
    assert response.headers["content-type"] == "text/event-stream"
    *events, done = events_of(response.text)
    assert done == {
        "type": "done",
        "seed": 3,
        "sample_rate": 48_000,
        "channels": 1,
        "duration": 4.0,
        "variant": "tiny",
        "format": "ogg",
    }
    audio = [base64.b64decode(event["audio"]) for event in events if event["type"] == "audio"]
    assert len(audio) >= 4
    assert b"".join(audio) == file.content
    progress = [event for event in events if event["type"] == "progress"]
    assert [event["done"] for event in progress] == list(range(10, progress[-1]["total"] + 1, 10))
    assert len({event["total"] for event in progress}) == 1
    assert events.index(progress[-1]) > events.index(next(event for event in events if event["type"] == "audio"))


def test_events_are_sent_without_asking_for_a_stream_as_well(server: Server) -> None:
    events = events_of(server.post(duration=0.5, seed=1, stream_format="sse").text)
    assert {event["type"] for event in events} == {"progress", "audio", "done"}


def test_the_play_address_streams(server: Server) -> None:
    response = requests.get(server.url(path="/1.0/play/80s%20pop.mp3"), timeout=TIMEOUT, stream=True)
    assert response.headers["content-type"] == "audio/mpeg"
    pieces = list(response.iter_content(None))
    assert len(pieces) >= 8
    same = server.stream(prompt="80s pop", seed=int(response.headers["x-seed"]), format="mp3")
    assert b"".join(pieces) == same.content


def test_what_is_wrong_with_a_stream_s_request_is_an_error_as_ever(server: Server) -> None:
    wrong: dict[str, Any] = {"format": "json", "duration": -1}
    for field, value in wrong.items():
        response = server.stream("tiny", **{field: value})
        assert response.status_code == 400
        assert response.json()["error"]["field"] == field


class Received:
    """A reply as it came over the wire, in the place of its socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, _: str) -> io.BytesIO:
        return io.BytesIO(self._data)


@pytest.mark.faults
def test_a_slow_reader_gets_all_of_it_and_holds_nobody_up(server: Server) -> None:
    fields = {**ENDLESS, "duration": 30, "stream": True, "format": "pcm", "normalization": "none"}
    beside = server.post(**CLIP)
    address = urlsplit(server.url())
    body = json.dumps(fields).encode()
    head = f"POST {address.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    with socket.socket() as reader:
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.settimeout(TIMEOUT)
        reader.connect((address.hostname, address.port))
        reader.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        received = reader.recv(5)
        for _ in range(4):
            received += reader.recv(5)
            assert server.post(**CLIP).content == beside.content
            time.sleep(0.5)
        while not received.endswith(LAST_CHUNK):
            received += reader.recv(2**16)
    response = http.client.HTTPResponse(Received(received))  # type: ignore[arg-type]
    response.begin()
    assert response.status == 200
    samples = response.read()
    assert len(samples) == 2 * 32_000 * 30
    assert samples == server.post(**fields).content


@pytest.mark.faults
def test_streams_whose_engine_dies_break_off_and_events_say_so(server: Server) -> None:
    audio = server.stream(**ENDLESS, format="pcm")
    events = server.stream(**ENDLESS, stream_format="sse", format="mp3")
    lines = events.iter_lines(decode_unicode=True)
    seen = []
    while "event: audio" not in seen:
        seen.append(next(lines))
    server.engine().kill()
    assert 0 < len(audio.content) < 2 * 32_000 * float(audio.headers["x-duration"])
    *before, last = events_of("\n".join([*seen, *lines, ""]))
    assert "done" not in {event["type"] for event in before}
    assert last["type"] == "error"
    assert (last["error"]["code"], last["error"]["type"]) == (500, "internal_error")
    assert server.post(**CLIP).status_code == 200


def test_a_stream_whose_time_is_over_says_so(server: Server) -> None:
    events = events_of(server.stream(**ENDLESS, stream_format="sse", format="mp3", timeout=1).text)
    assert events[-1]["type"] == "error"
    assert (events[-1]["error"]["code"], events[-1]["error"]["type"]) == (504, "deadline_exceeded")
    short = server.stream(**ENDLESS, format="pcm", timeout=1)
    assert 0 < len(short.content) < 2 * 32_000 * 120
