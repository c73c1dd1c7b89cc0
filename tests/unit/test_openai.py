"""OpenAI's speech and models endpoints, as its client libraries ask them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from handler.errors import RequestError
from handler.openai import models_list
from handler.question import ClipQuestion, ModelsQuestion
from tests.unit.test_request import FORM, PARSER, refusal

SPEECH = {"url_path": "/v1/audio/speech", "content-type": "application/json"}


def speech(body: Any, headers: Mapping[str, str] = SPEECH) -> ClipQuestion:
    question = PARSER.parse({"body": body}, headers)
    assert isinstance(question, ClipQuestion)
    assert question.openai
    return question


def refusal_of_speech(body: Any) -> RequestError:
    return refusal({"body": body}, SPEECH)


@pytest.mark.parametrize("path", ["v1/models", "/v1/models/"])
def test_the_models_can_be_listed(path: str) -> None:
    assert PARSER.parse({"body": b""}, {"url_path": path}) == ModelsQuestion()
    assert models_list("small", 1_700_000_000) == {
        "object": "list",
        "data": [{"id": "small", "object": "model", "created": 1_700_000_000, "owned_by": "musicgen"}],
    }


def test_a_speech_s_input_is_the_prompt_and_mp3_is_the_default() -> None:
    question = speech({"input": "80s pop"})
    request = question.request
    assert (request.prompt, request.format, request.stream_format, request.streams) == (
        "80s pop",
        "mp3",
        "audio",
        False,
    )
    assert question.ignored == []


@pytest.mark.parametrize(
    ("wanted", "audio_format"),
    [(name, name) for name in ("mp3", "opus", "aac", "flac", "wav", "pcm")] + [(None, "mp3")],
)
def test_every_response_format_of_openai_s_is_made(wanted: str | None, audio_format: str) -> None:
    assert speech({"input": "x", "response_format": wanted}).request.format == audio_format


@pytest.mark.parametrize("wanted", ["alac", "ogg", "json", "", 0, False, ["mp3"], {"a": 1}])
def test_a_response_format_that_is_not_made_is_refused_with_those_that_are(wanted: Any) -> None:
    error = refusal_of_speech({"input": "x", "response_format": wanted})
    assert error.field == "response_format"
    assert "one of mp3, opus, aac, flac, wav, pcm, not" in error.message


@pytest.mark.parametrize("name", ["response_format", "format", "output_format"])
def test_pcm_is_at_24_khz_unless_another_rate_is_asked_for(name: str) -> None:
    assert speech({"input": "x", name: "pcm"}).request.sample_rate == 24_000
    assert speech({"input": "x", name: "pcm", "sample_rate": None}).request.sample_rate == 24_000
    assert speech({"input": "x", name: "pcm", "sample_rate": 16_000}).request.sample_rate == 16_000
    assert speech({"input": "x", name: "wav"}).request.sample_rate is None
    assert speech({"input": "x"}).request.sample_rate is None


@pytest.mark.parametrize("body", [{}, {"input": None}, {"model": "small", "voice": "alloy"}, {"prompt": "x"}])
def test_a_speech_without_input_is_refused(body: dict[str, Any]) -> None:
    assert refusal_of_speech(body).field == "input"


def test_what_has_no_effect_is_taken_and_told() -> None:
    body = {"model": "tts-1", "voice": "alloy", "input": "x", "instructions": "softly", "speed": 1.5}
    assert speech(body).ignored == ["model", "voice", "speed", "instructions"]


@pytest.mark.parametrize(("given", "streams"), [("sse", True), ("audio", False), (None, False)])
def test_a_speech_s_stream_format_is_ours(given: str | None, streams: bool) -> None:
    assert speech({"input": "x", "stream_format": given}).request.streams is streams


def test_our_own_fields_stand_beside_openai_s() -> None:
    body = {"input": "x", "response_format": "wav", "duration": 2.5, "seed": 7, "classifier_free_guidance": 2}
    request = speech(body).request
    assert (request.duration, request.seed, request.cfg_coef, request.format) == (2.5, 7, 2, "wav")


@pytest.mark.parametrize("name", ["format", "output_format"])
def test_our_own_name_of_the_format_will_do_but_not_beside_openai_s(name: str) -> None:
    assert speech({"input": "x", name: "ogg"}).request.format == "ogg"
    assert "more than once" in refusal_of_speech({"input": "x", name: "ogg", "response_format": "wav"}).message


@pytest.mark.parametrize(
    ("fields", "field"), [({"prompt": "y"}, "prompt"), ({"voices": "x"}, "voices"), ({"duration": 0}, "duration")]
)
def test_a_speech_s_other_fields_are_checked_as_ours(fields: dict[str, Any], field: str) -> None:
    assert refusal_of_speech({"input": "x", **fields}).field == field


def test_a_speech_may_be_a_form() -> None:
    row = {"input": bytearray(b"80s pop"), "response_format": bytearray(b"opus"), "voice": bytearray(b"alloy")}
    question = PARSER.parse(row, {**FORM, "url_path": "v1/audio/speech"})
    assert isinstance(question, ClipQuestion)
    assert (question.request.prompt, question.request.format, question.ignored) == ("80s pop", "opus", ["voice"])


def test_a_request_in_our_own_shape_is_not_answered_in_openai_s() -> None:
    question = PARSER.parse({"body": {"input": "x"}}, {"content-type": "application/json"})
    assert isinstance(question, ClipQuestion)
    assert (question.openai, question.request.format, list(question.ignored)) == (False, "wav", [])
