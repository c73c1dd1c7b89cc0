"""Replies sent while the clip is made: the bytes of the file, and both dialects of events."""

from __future__ import annotations

import asyncio
import base64
import io
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
import soundfile
import torch

from handler.audio_encoder import StreamEncoder
from handler.engine.messages import (
    Audio,
    Card,
    DeadlineExceededError,
    Done,
    EngineBusyError,
    EngineDiedError,
    Event,
    Failed,
    JobCancelledError,
    Progress,
    Restarted,
    Started,
)
from handler.errors import RequestError
from handler.request import GenerationRequest
from handler.stream_audio import StreamLevel
from handler.streaming import OPENAI, OURS, EventNames, streamed_reply
from tests.unit.test_request import parse_json

RATE = 32_000
CARD = Card(RATE, 2, 50.0, 30.0, ("description",), "cpu", "float32", 8, None)
SAMPLES = 49 * 640  # 0.99 seconds are 49 whole frames
WAV = 0.3 * torch.sin(torch.arange(SAMPLES) / 9).repeat(2, 1)
PIECES = WAV.split([16_000, 640, SAMPLES - 16_640], dim=1)
DONE = Done(torch.zeros(4, 49, dtype=torch.int64).numpy())
CLIP: list[Event] = [
    Started(),
    *(event for number, piece in enumerate(PIECES) for event in (Progress(number, 3), Audio(piece.numpy()))),
    DONE,
]
BEGUN = CLIP[:5]  # two of its three pieces have come


def request(**fields: Any) -> GenerationRequest:
    return parse_json({"seed": 7, "duration": 0.99, "stream": True, **fields})


def streamed(
    events: list[Event], wanted: GenerationRequest, names: EventNames = OURS
) -> tuple[str, dict[str, str], bytes, Exception | None]:
    """A reply's content type, headers and body, and what broke it off."""

    async def source() -> AsyncIterator[Event]:
        for event in events:
            yield event

    async def run() -> tuple[str, dict[str, str], bytes, Exception | None]:
        reply = await streamed_reply(source(), wanted, CARD, "small", "id-1", names)
        body = b""
        try:
            async for piece in reply.body:
                body += piece
        except Exception as error:
            return reply.content_type, dict(reply.headers), body, error
        return reply.content_type, dict(reply.headers), body, None

    return asyncio.run(run())


def encoded(wanted: GenerationRequest, pieces: tuple[torch.Tensor, ...] = PIECES, finish: bool = True) -> bytes:
    encoder = StreamEncoder(wanted.format, RATE, 2, SAMPLES, 7, wanted.sample_rate)
    level = StreamLevel(wanted.normalization, RATE)
    body = b"".join(encoder.push(level.push(piece)) for piece in pieces)
    return body + encoder.push(level.finish()) + encoder.finish() if finish else body


def told(body: bytes) -> list[dict[str, Any]]:
    """The data of server-sent events, each checked against its name where it has one."""
    contents = []
    for block in body.decode().removesuffix("\n\n").split("\n\n"):
        *name, data = block.split("\n")
        content = json.loads(data.removeprefix("data: "))
        assert name in ([], [f"event: {content['type']}"])
        contents.append(content)
    return contents


def audio_of(contents: list[dict[str, Any]], kind: str) -> bytes:
    return b"".join(base64.b64decode(content["audio"]) for content in contents if content["type"] == kind)


@pytest.mark.parametrize(
    ("audio_format", "content_type", "rate"),
    [
        ("wav", "audio/wav", RATE),
        ("flac", "audio/flac", RATE),
        ("ogg", "audio/ogg", 48_000),
        ("opus", "audio/ogg", 48_000),
        ("mp3", "audio/mpeg", RATE),
        ("aac", "audio/aac", RATE),
        ("pcm", "audio/pcm", RATE),
    ],
)
@pytest.mark.parametrize("normalization", ["loudness", "none"])
def test_a_stream_is_the_file_of_its_pieces_and_says_what_it_is(
    audio_format: str, content_type: str, rate: int, normalization: str
) -> None:
    wanted = request(format=audio_format, normalization=normalization)
    kind, headers, body, error = streamed(CLIP, wanted)
    assert (kind, body, error) == (content_type, encoded(wanted), None)
    assert headers == {
        "x-seed": "7",
        "x-sample-rate": str(rate),
        "x-channels": "2",
        "x-duration": "0.98",
        "x-variant": "small",
    }
    if audio_format in ("flac", "wav"):  # their headers tell the length, which a stream must know before it begins
        assert soundfile.info(io.BytesIO(body)).frames == SAMPLES


@pytest.mark.parametrize("audio_format", ["mp3", "pcm"])
def test_events_tell_progress_audio_and_the_metadata(audio_format: str) -> None:
    wanted = request(format=audio_format, stream_format="sse")
    kind, headers, body, error = streamed(CLIP, wanted)
    contents = told(body)
    assert (kind, headers["x-duration"], error) == ("text/event-stream", "0.98", None)
    assert body.count(b"event: ") == len(contents)
    assert audio_of(contents, "audio") == encoded(wanted)
    assert [content for content in contents if content["type"] == "progress"] == [
        {"type": "progress", "done": done, "total": 3} for done in range(3)
    ]
    assert contents[-1] == {
        "type": "done",
        "seed": 7,
        "sample_rate": RATE,
        "channels": 2,
        "duration": 0.98,
        "variant": "small",
        "format": audio_format,
    }


def test_openai_s_events_have_no_names_and_no_progress() -> None:
    wanted = request(format="mp3", stream_format="sse")
    *deltas, last = told(body := streamed(CLIP, wanted, OPENAI)[2])
    assert b"event:" not in body
    assert {content["type"] for content in deltas} == {"speech.audio.delta"}
    assert audio_of(deltas, "speech.audio.delta") == encoded(wanted)
    assert last["type"] == "speech.audio.done"
    assert last["usage"]["seed"] == 7


@pytest.mark.parametrize("names", [OURS, OPENAI], ids=["ours", "openai"])
def test_no_event_is_without_audio_to_tell(names: EventNames) -> None:
    """The level of the first 0.4 seconds is not decided before all of it is there."""
    events: list[Event] = [Started(), Audio(WAV[:, :640].numpy()), Audio(WAV[:, 640:].numpy()), DONE]
    contents = told(streamed(events, request(format="pcm", stream_format="sse"), names)[2])
    assert all(content.get("audio") != "" for content in contents)


@pytest.mark.parametrize(
    "error",
    [
        EngineBusyError("64 requests are waiting already", 5),
        RequestError("prompt", "is too long"),
        DeadlineExceededError("x"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("stream_format", ["audio", "sse"])
def test_what_fails_before_it_begins_is_no_stream(error: Exception, stream_format: str) -> None:
    with pytest.raises(type(error)):
        streamed([Failed(error)], request(stream_format=stream_format))


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
@pytest.mark.parametrize("events", [CLIP, [*BEGUN, Failed(EngineDiedError("the engine died"))]], ids=["whole", "cut"])
def test_a_stream_s_encoder_is_released_at_its_end(
    events: list[Event], stream_format: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[StreamEncoder] = []
    monkeypatch.setattr(StreamEncoder, "close", lambda encoder: closed.append(encoder))
    streamed(events, request(format="flac", stream_format=stream_format))
    assert len(closed) == 1


def test_a_stream_that_breaks_off_ends_short_and_raises_why() -> None:
    wanted = request(format="pcm", normalization="none")
    failure = EngineDiedError("the engine died")
    _, headers, body, error = streamed([*BEGUN, Failed(failure)], wanted)
    assert error is failure
    assert body == encoded(wanted, PIECES[:2], finish=False)
    assert len(body) < float(headers["x-duration"]) * RATE * 4


@pytest.mark.parametrize("names", [OURS, OPENAI], ids=["ours", "openai"])
@pytest.mark.parametrize(
    ("failure", "code", "kind"),
    [(JobCancelledError("was cancelled"), 499, "cancelled"), (RuntimeError("secret"), 500, "internal_error")],
)
def test_events_that_break_off_end_with_an_error(names: EventNames, failure: Exception, code: int, kind: str) -> None:
    wanted = request(format="pcm", normalization="none", stream_format="sse")
    _, _, body, error = streamed([*BEGUN, Failed(failure)], wanted, names)
    *before, last = told(body)
    assert error is failure
    assert base64.b64decode(before[-1]["audio"]) == encoded(wanted, PIECES[1:2], finish=False)
    assert last["type"] == "error"
    assert (last["error"]["code"], last["error"]["type"]) == (code, kind)
    assert "secret" not in body.decode()


@pytest.mark.parametrize("stream_format", ["audio", "sse"])
def test_a_death_of_the_engine_before_any_audio_changes_nothing_heard(stream_format: str) -> None:
    wanted = request(format="ogg", stream_format=stream_format)
    for events in (
        [Restarted(), *CLIP],
        [Started(), Restarted(), *CLIP],
        [Started(), Progress(0, 3), Restarted(), *CLIP],
    ):
        body, expected = streamed(events, wanted)[2], streamed(CLIP, wanted)[2]
        if stream_format == "sse":
            assert audio_of(told(body), "audio") == audio_of(told(expected), "audio")
        else:
            assert body == expected
