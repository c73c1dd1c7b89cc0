"""OpenAI's own client library, with this server's address as its base URL."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import av
import openai
import pytest

from tests.e2e.conftest import Server

SPEECH: dict[str, Any] = {"model": "tiny", "voice": "alloy", "input": "80s pop"}
CLIP: dict[str, Any] = {"duration": 1, "seed": 3}
"""Fields of ours, which the library sends along as `extra_body`."""


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url(path="/1.0/v1"), api_key="x", max_retries=0)


@pytest.mark.parametrize("response_format", ["mp3", "opus", "aac", "flac", "wav"])
def test_speech_is_the_clip_in_the_format_asked_for(
    client: openai.OpenAI, server: Server, response_format: Any
) -> None:
    speech = client.audio.speech.create(**SPEECH, response_format=response_format, extra_body=CLIP)
    assert speech.content == server.post(prompt="80s pop", format=response_format, **CLIP).content
    with av.open(io.BytesIO(speech.content), "r") as file:
        samples = sum(frame.samples for frame in file.decode(audio=0))
        assert 1 <= samples / file.streams.audio[0].rate < 1.1


def test_pcm_is_at_24_khz(client: openai.OpenAI, server: Server) -> None:
    speech = client.audio.speech.create(**SPEECH, response_format="pcm", extra_body=CLIP)
    assert speech.response.headers["x-sample-rate"] == "24000"
    assert len(speech.content) == 24_000 * 2
    assert speech.content == server.post(prompt="80s pop", format="pcm", sample_rate=24_000, **CLIP).content


def test_the_default_is_mp3(client: openai.OpenAI) -> None:
    speech = client.audio.speech.create(**SPEECH, extra_body=CLIP)
    assert speech.response.headers["content-type"] == "audio/mpeg"


def test_what_has_no_effect_is_named(client: openai.OpenAI) -> None:
    raw = client.audio.speech.with_raw_response
    reply = raw.create(**SPEECH, instructions="slowly", speed=1.5, extra_body=CLIP)
    assert reply.headers["x-no-effect"] == "model, voice, speed, instructions"
    assert reply.content == client.audio.speech.create(**SPEECH, extra_body=CLIP).content


def test_speech_is_saved_while_it_comes(client: openai.OpenAI, server: Server) -> None:
    extra = {**CLIP, "duration": 4, "stream": True}
    with client.audio.speech.with_streaming_response.create(
        **SPEECH, response_format="pcm", extra_body=extra
    ) as speech:
        pieces = list(speech.iter_bytes())
    assert len(pieces) >= 4
    assert b"".join(pieces) == server.post(prompt="80s pop", format="pcm", sample_rate=24_000, **extra).content


def test_events_are_those_of_openai(client: openai.OpenAI, server: Server) -> None:
    speech = client.audio.speech.with_streaming_response
    with speech.create(**SPEECH, response_format="mp3", stream_format="sse", extra_body=CLIP) as reply:
        lines = [line for line in reply.iter_lines() if line]
    *deltas, done = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert {event["type"] for event in deltas} == {"speech.audio.delta"}
    assert done["type"] == "speech.audio.done"
    assert (done["usage"]["seed"], done["usage"]["duration"]) == (3, 1.0)
    streamed = server.post(prompt="80s pop", format="mp3", stream=True, **CLIP)
    assert b"".join(base64.b64decode(event["audio"]) for event in deltas) == streamed.content


def test_the_models_are_the_one_at_this_address(client: openai.OpenAI) -> None:
    [model] = client.models.list()
    assert (model.id, model.object) == ("tiny", "model")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"response_format": "alac"}, "must be one of mp3, opus, aac, flac, wav, pcm"),
        ({"extra_body": {"duration": -1}}, "duration: must be a number from 0.02 to 120"),
        ({"extra_body": {"prompts": "x"}}, "did you mean prompt?"),
        ({"extra_body": {"prompt": "x"}}, "is given more than once"),
    ],
)
def test_a_bad_request_raises_with_our_message(client: openai.OpenAI, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(openai.BadRequestError) as raised:
        client.audio.speech.create(**SPEECH, **fields)
    assert message in str(raised.value)
    assert raised.value.type == "invalid_request"
