from __future__ import annotations

import base64
import io
import json
from typing import Any

import av
import pytest
import soundfile
import torch
from torch import Tensor

from handler.engine.messages import (
    Card,
    DeadlineExceededError,
    EngineBusyError,
    EngineUnavailableError,
    JobCancelledError,
)
from handler.errors import ModelDivergedError, RequestError, UnknownRequestError
from handler.question import ClipQuestion
from handler.reply import clip_reply, error_reply, json_reply, most_bytes
from handler.request import GenerationRequest, Limits
from handler.request_parser import MediaTypeError, RequestParser, UnknownPathError

pytestmark = pytest.mark.faults

PARSER = RequestParser(Limits(120.0, 600.0, 512, 1_000_000, 60.0, 50.0, 30.0))


def request(**fields: Any) -> GenerationRequest:
    parsed = PARSER.parse({"body": {"seed": 7, **fields}}, {"content-type": "application/json"})
    assert isinstance(parsed, ClipQuestion)
    return parsed.request


def clip(channels: int = 2, seconds: float = 1.0) -> Tensor:
    time = torch.arange(int(32_000 * seconds)) / 32_000
    return 0.3 * torch.sin(2 * torch.pi * 330 * time).repeat(channels, 1)


@pytest.mark.parametrize("audio_format", PARSER.fields["format"]["enum"])
@pytest.mark.parametrize("channels", [1, 2])
def test_no_reply_is_longer_than_was_said_before_the_clip_was_made(audio_format: str, channels: int) -> None:
    card = Card(32_000, channels, 50.0, 30.0, ("description",), "cpu", "float32", 8, None)
    noise = torch.rand(channels, 32_000 * 10, generator=torch.Generator().manual_seed(0)) * 2 - 1
    asked = request(format=audio_format, duration=10)
    most = most_bytes(asked, card)
    assert len(clip_reply(asked, noise, 32_000, "small").body) <= most
    if audio_format in ("wav", "pcm"):
        assert most < 32_000 * 10 * channels * 2 + 10_000


@pytest.mark.parametrize(
    ("audio_format", "content_type", "rate"),
    [
        ("wav", "audio/wav", 32_000),
        ("flac", "audio/flac", 32_000),
        ("ogg", "audio/ogg", 48_000),
        ("opus", "audio/ogg", 48_000),
        ("mp3", "audio/mpeg", 32_000),
        ("aac", "audio/aac", 32_000),
        ("pcm", "audio/pcm", 32_000),
    ],
)
def test_a_clip_comes_in_the_format_asked_for_and_says_what_it_is(
    audio_format: str, content_type: str, rate: int
) -> None:
    reply = clip_reply(request(format=audio_format), clip(), 32_000, "small")
    assert (reply.status, reply.content_type) == (200, content_type)
    assert reply.headers == {
        "x-seed": "7",
        "x-sample-rate": str(rate),
        "x-channels": "2",
        "x-duration": "1.0",
        "x-variant": "small",
    }
    if audio_format == "pcm":
        assert len(reply.body) == 32_000 * 2 * 2
    else:
        with av.open(io.BytesIO(reply.body)) as file:
            [stream] = file.streams.audio
            assert (stream.rate, stream.channels) == (rate, 2)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_a_clip_comes_at_the_rate_asked_for_with_the_same_level_and_duration(rate: int) -> None:
    reply = clip_reply(request(sample_rate=rate, normalization="none"), clip(), 32_000, "small")
    samples, file_rate = soundfile.read(io.BytesIO(reply.body))
    assert (file_rate, samples.shape) == (rate, (rate, 2))
    assert (reply.headers["x-sample-rate"], reply.headers["x-duration"]) == (str(rate), "1.0")
    assert samples.std() == pytest.approx(float(clip().std()), rel=0.01)
    in_json = json.loads(clip_reply(request(sample_rate=rate, format="json"), clip(), 32_000, "small").body)
    assert in_json["sample_rate"] == rate


def test_opus_comes_at_48_khz_where_it_does_not_take_the_rate_asked_for() -> None:
    for rate, sent in ((8_000, "8000"), (24_000, "24000"), (22_050, "48000"), (44_100, "48000")):
        reply = clip_reply(request(sample_rate=rate, format="opus"), clip(), 32_000, "small")
        assert reply.headers["x-sample-rate"] == sent


def test_json_holds_a_wav_and_what_the_headers_say() -> None:
    reply = clip_reply(request(format="json"), clip(), 32_000, "small")
    content = json.loads(reply.body)
    assert reply.content_type == "application/json"
    assert base64.b64decode(content.pop("audio")) == clip_reply(request(), clip(), 32_000, "small").body
    assert content == {
        "seed": 7,
        "sample_rate": 32_000,
        "channels": 2,
        "duration": 1.0,
        "variant": "small",
        "format": "wav",
    }


def test_the_level_is_set_as_asked() -> None:
    def peak(strategy: str) -> float:
        body = clip_reply(request(normalization=strategy), clip(), 32_000, "small").body
        return float(abs(soundfile.read(io.BytesIO(body))[0]).max())

    assert peak("none") == pytest.approx(0.3, abs=1e-3)
    assert peak("peak") == pytest.approx(10 ** (-1 / 20), abs=1e-3)


@pytest.mark.parametrize("variant", ["a\r\nx-evil: 1", "é", "\x00"])
def test_nothing_can_break_out_of_a_header(variant: str) -> None:
    value = clip_reply(request(), clip(), 32_000, variant).headers["x-variant"]
    assert value.isascii()
    assert value.isprintable()


def test_a_description_is_json() -> None:
    reply = json_reply({"variant": "small"})
    assert (reply.status, reply.content_type, json.loads(reply.body)) == (200, "application/json", {"variant": "small"})


@pytest.mark.parametrize(
    ("error", "status", "kind", "field"),
    [
        (RequestError("top_k", "must be a number"), 400, "invalid_request", "top_k"),
        (UnknownPathError(None, "there is nothing"), 404, "not_found", None),
        (MediaTypeError(None, "is not read"), 415, "unsupported_media_type", None),
        (UnknownRequestError("id", "no request of this id"), 404, "unknown_request", "id"),
        (EngineBusyError("64 requests are waiting already", 5), 503, "busy", None),
        (EngineUnavailableError("the engine is closing"), 503, "unavailable", None),
        (DeadlineExceededError("its timeout passed"), 504, "deadline_exceeded", None),
        (JobCancelledError("was cancelled"), 499, "cancelled", None),
        (ModelDivergedError("its logits are not finite"), 500, "model_diverged", None),
    ],
)
def test_an_error_is_json_with_its_status_and_field(error: Exception, status: int, kind: str, field: str) -> None:
    reply = error_reply(error, "id-1")
    assert (reply.status, reply.content_type) == (status, "application/json")
    assert json.loads(reply.body) == {"error": {"code": status, "type": kind, "message": str(error), "field": field}}


def test_a_busy_server_says_when_to_come_back() -> None:
    assert error_reply(EngineBusyError("64 requests are waiting already", 5), "id-1").headers == {"retry-after": "5"}


@pytest.mark.parametrize("error", [RuntimeError("secret path /root"), KeyError("x"), MemoryError(), SystemExit(1)])
def test_what_went_wrong_inside_stays_in_the_log(error: BaseException) -> None:
    reply = error_reply(error, "id-1")
    content = json.loads(reply.body)["error"]
    assert (reply.status, content["type"]) == (500, "internal_error")
    assert "id-1" in content["message"]
    assert "secret" not in content["message"]
