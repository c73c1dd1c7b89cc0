"""The input of Replicate's model meta/musicgen, as its clients send it."""

from __future__ import annotations

from typing import Any

import pytest

from handler.question import ClipQuestion
from handler.request_parser import RequestParser
from tests.unit.test_request import (
    FORM,
    MELODY_PARSER,
    MULTIPART,
    PARSER,
    STYLE_PARSER,
    base64_of,
    parse_json,
    refusal,
    refusal_of_json,
    wav_file,
)

JSON = {"content-type": "application/json"}
FILE = wav_file(1.0)
AUDIO = base64_of(FILE)
INPUT: dict[str, Any] = {
    "model_version": "stereo-large",
    "prompt": "80s pop",
    "duration": 4,
    "continuation": False,
    "continuation_start": 0,
    "continuation_end": None,
    "multi_band_diffusion": False,
    "normalization_strategy": "peak",
    "top_k": 250,
    "top_p": 0,
    "temperature": 1,
    "classifier_free_guidance": 3,
    "output_format": "mp3",
    "seed": -1,
}
"""The fields of the model with their defaults."""


def question_of(body: Any, parser: RequestParser = PARSER) -> ClipQuestion:
    question = parser.parse({"body": body}, JSON)
    assert isinstance(question, ClipQuestion)
    return question


@pytest.mark.parametrize("parser", [PARSER, MELODY_PARSER, STYLE_PARSER])
@pytest.mark.parametrize("body", [INPUT, {"input": INPUT}])
def test_an_input_with_every_default_is_a_clip(body: dict[str, Any], parser: RequestParser) -> None:
    question = question_of(body, parser)
    request = question.request
    assert (request.prompt, request.duration, request.format, request.normalization) == ("80s pop", 4, "mp3", "peak")
    assert (request.melody, request.style, request.continuation) == (None, None, None)
    assert question.ignored == ["model_version", "multi_band_diffusion"]


def test_fields_beside_an_input_count_and_none_may_come_twice() -> None:
    question = question_of({"version": "b05b", "input": {"prompt": "x"}, "format": "flac"})
    assert (question.request.prompt, question.request.format) == ("x", "flac")
    assert question.ignored == ["version"]
    error = refusal_of_json({"input": {"prompt": "x", "seed": 1}, "seed": 2})
    assert (error.field, "inside `input`" in error.message) == ("seed", True)
    assert refusal_of_json({"input": {"prompt": "x"}, "text": "y"}).field == "prompt"


def test_an_empty_input_is_an_unconditional_clip_and_a_text_is_the_prompt() -> None:
    assert parse_json({"input": {}}).prompt is None
    assert parse_json({"input": {"input": "80s pop"}}).prompt == "80s pop"
    assert parse_json({"input": "80s pop"}).prompt == "80s pop"
    assert refusal_of_json({"input": {"input": {}}}).field == "prompt"
    assert refusal_of_json({"input": [{"prompt": "x"}]}).field == "prompt"


def test_a_wrong_field_inside_an_input_is_named() -> None:
    assert refusal_of_json({"input": {"promt": "x"}}).field == "promt"
    assert refusal_of_json({"input": {"duration": 1000}}).field == "duration"


def test_a_part_of_a_form_that_says_it_is_json_may_be_the_input() -> None:
    question = PARSER.parse({"input": {"prompt": "x"}, "seed": bytearray(b"3")}, MULTIPART)
    assert isinstance(question, ClipQuestion)
    assert (question.request.prompt, question.request.seed) == ("x", 3)


@pytest.mark.parametrize(
    ("parser", "continuation", "field"),
    [
        (PARSER, True, "continuation"),
        (MELODY_PARSER, True, "continuation"),
        (MELODY_PARSER, False, "melody"),
        (MELODY_PARSER, None, "melody"),
        (STYLE_PARSER, False, "style"),
        (STYLE_PARSER, None, "style"),
    ],
)
def test_an_input_audio_is_continued_or_conditions_the_model(
    parser: RequestParser, continuation: bool | None, field: str
) -> None:
    in_json = question_of({"input_audio": AUDIO, "continuation": continuation}, parser)
    text = {True: b"true", False: b"False", None: b""}[continuation]
    in_form = parser.parse({"input_audio": bytearray(FILE), "continuation": bytearray(text)}, MULTIPART)
    assert isinstance(in_form, ClipQuestion)
    for request in (in_json.request, in_form.request):
        given = [name for name in ("melody", "style", "continuation") if getattr(request, name) is not None]
        assert given == [field]


def test_audio_to_continue_may_stand_beside_an_input_audio() -> None:
    request = question_of({"continuation": AUDIO, "input_audio": AUDIO}, MELODY_PARSER).request
    assert request.continuation is not None
    assert request.melody is not None


@pytest.mark.parametrize(
    ("body", "parser", "field", "message"),
    [
        ({"continuation": True}, PARSER, "continuation", "no audio to continue"),
        ({"input_audio": AUDIO}, PARSER, "input_audio", "set `continuation` to true"),
        ({"input_audio": AUDIO, "continuation": False}, PARSER, "input_audio", "set `continuation` to true"),
        ({"input_audio": AUDIO, "melody": AUDIO}, MELODY_PARSER, "melody", "means `melody`"),
        ({"input_audio": "????"}, MELODY_PARSER, "melody", ""),
        ({"multi_band_diffusion": True}, PARSER, "multi_band_diffusion", "is not available"),
        ({"webhook": "https://example.com", "input": {}}, PARSER, "webhook", "is not a field"),
    ],
)
def test_what_cannot_be_done_is_refused(body: dict[str, Any], parser: RequestParser, field: str, message: str) -> None:
    error = refusal_of_json(body, parser)
    assert error.field == field
    assert message in error.message


def test_a_form_s_booleans_are_read() -> None:
    row = {"multi_band_diffusion": b"false", "model_version": b"large", "continuation": b"off", "prompt": b"x"}
    question = PARSER.parse(row, FORM)
    assert isinstance(question, ClipQuestion)
    assert question.ignored == ["model_version", "multi_band_diffusion"]
    assert refusal({"multi_band_diffusion": b"true"}, FORM).field == "multi_band_diffusion"
    assert refusal({"continuation": b"true"}, FORM).field == "continuation"
