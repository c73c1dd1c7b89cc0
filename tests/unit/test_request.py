from __future__ import annotations

import base64
import gc
import io
import math
import re
import weakref
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import soundfile

from handler.errors import RequestError
from handler.question import ClipQuestion, DescriptionQuestion
from handler.request import ALIASES, GenerationRequest, Limits
from handler.request_parser import MediaTypeError, RequestParser, UnknownPathError

LIMITS = Limits(
    max_duration=120.0,
    timeout=600.0,
    max_prompt_tokens=512,
    max_upload_bytes=200_000,
    max_upload_seconds=20.0,
    frame_rate=50.0,
    window=30.0,
)
PARSER = RequestParser(LIMITS)
MELODY_PARSER = RequestParser(replace(LIMITS, melody="chroma"))
STYLE_PARSER = RequestParser(replace(LIMITS, melody="style"))
FORM = {"content-type": "application/x-www-form-urlencoded"}
MULTIPART = {"content-type": "multipart/form-data; boundary=x"}
NO_VALUES: Mapping[str, Any] = {}


def wav_file(seconds: float, sample_rate: int = 16_000, channels: int = 1) -> bytes:
    samples = np.linspace(-0.5, 0.5, int(seconds * sample_rate), dtype="float32")
    buffer = io.BytesIO()
    soundfile.write(buffer, np.stack([samples] * channels, 1), sample_rate, format="WAV", subtype="FLOAT")
    return buffer.getvalue()


def flac_file(seconds: float) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.zeros(int(8_000 * seconds)), 8_000, format="FLAC")
    return buffer.getvalue()


def base64_of(data: bytes) -> str:
    return base64.b64encode(data).decode()


def parse(
    row: Mapping[str, Any], headers: Mapping[str, str] = NO_VALUES, parser: RequestParser = PARSER
) -> GenerationRequest:
    question = parser.parse(row, headers)
    assert isinstance(question, ClipQuestion)
    return question.request


def parse_json(body: Any, parser: RequestParser = PARSER) -> GenerationRequest:
    return parse({"body": body}, {"content-type": "application/json"}, parser)


def refusal(
    row: Mapping[str, Any], headers: Mapping[str, str] = NO_VALUES, parser: RequestParser = PARSER
) -> RequestError:
    with pytest.raises(RequestError) as caught:
        parser.parse(row, headers)
    return caught.value


def refusal_of_json(body: Any, parser: RequestParser = PARSER) -> RequestError:
    return refusal({"body": body}, {"content-type": "application/json"}, parser)


# ---- forms of body


def test_an_empty_json_object_is_an_unconditional_clip_with_the_defaults() -> None:
    request = parse_json({})
    assert request.prompt is None
    assert request.duration == 8
    assert (request.temperature, request.top_k, request.top_p, request.use_sampling) == (1.0, 250, 0.0, True)
    assert (request.cfg_coef, request.cfg_coef_beta, request.two_step_cfg) == (3.0, None, False)
    assert (request.format, request.normalization, request.timeout) == ("wav", "loudness", 600)


def test_the_default_duration_is_the_longest_where_that_is_less_than_eight_seconds() -> None:
    limits = Limits(5.0, 600.0, 512, 1000, 1.0, 50.0, 30.0)
    assert parse_json({}, RequestParser(limits)).duration == 5


def test_plain_text_is_the_prompt() -> None:
    for body in ("80s pop", b"80s pop", bytearray(b"80s pop")):
        assert parse({"body": body}, {"content-type": "text/plain; charset=utf-8"}).prompt == "80s pop"


def test_json_that_the_server_left_unparsed_is_parsed() -> None:
    request = parse({"body": bytearray(b'{"prompt": "x"}')}, {"content-type": "Application/JSON; charset=utf-8"})
    assert request.prompt == "x"


@pytest.mark.parametrize("headers", [FORM, MULTIPART, NO_VALUES])
def test_a_form_s_strings_become_the_fields_types(headers: Mapping[str, str]) -> None:
    request = parse(
        {
            "prompt": bytearray("été".encode()),
            "duration": b"2.5",
            "top_k": b" 10 ",
            "use_sampling": b"False",
            "two_step_cfg": b"on",
            "cfg_coef": b"-1e0",
            "seed": b"9223372036854775807",
            "format": b"mp3",
        },
        headers,
    )
    assert (request.prompt, request.duration, request.top_k) == ("été", 2.5, 10)
    assert (request.use_sampling, request.two_step_cfg) == (False, True)
    assert (request.cfg_coef, request.seed, request.format) == (-1.0, 2**63 - 1, "mp3")


def test_a_part_that_says_it_is_json_counts_as_its_value() -> None:
    assert parse({"prompt": "x", "duration": 2}, MULTIPART).duration == 2


def test_no_body_and_no_content_type_asks_for_the_description() -> None:
    assert PARSER.parse({"body": bytearray()}, {}) == DescriptionQuestion()
    assert PARSER.parse({}, {}) == DescriptionQuestion()


def test_a_form_without_its_boundary_is_told_of_it() -> None:
    error = refusal({"body": b"--x\r\n"}, {"content-type": "multipart/form-data"})
    assert error.field is None
    assert "boundary" in str(error)


def test_an_empty_form_explains_how_to_send_a_field() -> None:
    message = str(refusal({}, FORM))
    assert "--json" in message
    assert "-d 'prompt=80s pop'" in message


@pytest.mark.parametrize(
    "body", [b"", b'{"prompt":', b"nonsense", b"\xff\xfe", b"[" * 100_000, b'{"a":' * 100_000, b"[1" + b"0" * 5000]
)
def test_malformed_json_is_refused_and_not_taken_for_a_prompt(body: bytes) -> None:
    assert "not valid JSON" in str(refusal_of_json(bytearray(body)))


@pytest.mark.parametrize("body", [[], [{"prompt": "x"}], "x", 3, None, True, 1.5])
def test_json_must_be_an_object(body: Any) -> None:
    assert "must be an object" in str(refusal_of_json(body))


@pytest.mark.parametrize(
    ("body", "content_type"),
    [(b"RIFF", "audio/wav"), (b"x", ""), (b"x", "application/octet-stream"), ("<p>", "text/html"), (b"", "audio/wav")],
)
def test_a_body_of_another_type_is_refused_with_the_types_that_are_read(body: Any, content_type: str) -> None:
    error = refusal({"body": body}, {"content-type": content_type})
    assert isinstance(error, MediaTypeError)
    assert "application/json" in str(error)


def test_text_that_is_not_utf8_is_refused() -> None:
    assert refusal({"body": bytearray(b"\xff")}, {"content-type": "text/plain"}).field == "prompt"
    assert refusal({"prompt": bytearray(b"\xff")}, FORM).field == "prompt"


# ---- the path


@pytest.mark.parametrize(
    ("path", "prompt", "audio_format"),
    [
        ("play/80s pop.mp3", "80s pop", "mp3"),
        ("/play/a/b.c.WAV", "a/b.c", "wav"),
        ("play/.ogg", "", "ogg"),
        ("play/x.opus", "x", "opus"),
        ("play/x.AAC", "x", "aac"),
    ],
)
def test_a_play_path_is_a_prompt_and_a_format(path: str, prompt: str, audio_format: str) -> None:
    request = parse({"body": b""}, {"url_path": path})
    assert (request.prompt, request.format, request.streams) == (prompt, audio_format, True)


def test_a_play_path_to_json_is_one_whole_reply() -> None:
    request = parse({"body": b""}, {"url_path": "play/rock.json"})
    assert (request.format, request.streams) == ("json", False)


def test_a_play_path_takes_further_fields_but_none_of_its_own_twice() -> None:
    headers = {"url_path": "play/rock.mp3", "content-type": "application/json"}
    assert parse({"body": {"duration": 2}}, headers).duration == 2
    assert parse({"body": {"stream_format": "sse"}}, headers).stream_format == "sse"
    for twice, field in (("text", "prompt"), ("format", "format"), ("stream", "stream")):
        assert refusal({"body": {twice: "pop"}}, headers).field == field


def test_a_play_path_with_an_unknown_format_is_refused() -> None:
    assert refusal({"body": b""}, {"url_path": "play/rock.midi"}).field == "format"


@pytest.mark.parametrize("path", ["x", "play", "play/rock", "v1/audio", "playing/x.mp3", "cancel/x"])
def test_an_unknown_path_is_not_found(path: str) -> None:
    assert isinstance(refusal({"body": b""}, {"url_path": path}), UnknownPathError)


# ---- names


@pytest.mark.parametrize(("alias", "name"), ALIASES.items())
def test_an_alias_means_its_field_and_both_together_are_refused(alias: str, name: str) -> None:
    value: Any = {"prompt": "x", "cfg_coef": 2.0, "format": "ogg", "normalization": "rms"}[name]
    assert getattr(parse_json({alias: value}), name) == value
    error = refusal_of_json({alias: value, name: value})
    assert error.field == name
    assert alias in str(error)


def test_an_unknown_field_is_refused_with_the_close_one() -> None:
    error = refusal_of_json({"promt": "x"})
    assert (error.field, error.message) == ("promt", "is not a field; did you mean prompt?")
    assert "duration" in str(refusal_of_json({"zzz": 1}))
    assert len(str(refusal_of_json({"z" * 10_000: 1}))) < 500


# ---- bounds

BAD_NUMBERS: list[Any] = ["1", "", True, False, [], {}, math.nan, math.inf, -math.inf, 10**400, -(10**400)]


@pytest.mark.parametrize("name", ["duration", "timeout", "temperature", "top_k", "top_p", "cfg_coef"])
@pytest.mark.parametrize("value", BAD_NUMBERS, ids=lambda value: str(value)[:12])
def test_what_is_no_number_or_none_in_bounds_is_refused_with_the_bounds(name: str, value: Any) -> None:
    error = refusal_of_json({name: value})
    assert error.field == name
    assert "number" in error.message
    assert str(PARSER.fields[name]["maximum"]) in error.message
    assert len(str(error)) < 300


@pytest.mark.parametrize(
    ("name", "smallest", "largest", "below", "above"),
    [
        ("duration", 0.02, 120, 0.0199, 120.001),
        ("timeout", 1e-9, 600, 0, 600.1),
        ("temperature", 0, 10, -0.1, 10.1),
        ("top_k", 0, 1_000_000, -1, 1_000_001),
        ("top_p", 0, 1, -0.01, 1.01),
        ("cfg_coef", -100, 100, -101, 101),
        ("cfg_coef_beta", -100, 100, -101, 101),
        ("seed", 0, 2**63 - 1, -2, 2**63),
        ("extend_stride", 0.02, 29.98, 0.0, 30),
    ],
)
def test_the_bounds_themselves_are_allowed_and_what_is_beyond_is_not(
    name: str, smallest: float, largest: float, below: float, above: float
) -> None:
    for value in (smallest, largest):
        assert getattr(parse_json({name: value}), name) == value
    for value in (below, above):
        error = refusal_of_json({name: value})
        assert error.field == name
        assert "must be a" in error.message


@pytest.mark.parametrize("name", ["top_k", "seed", "eval_q", "ds_factor"])
def test_whole_numbers_are_not_rounded_from_others(name: str) -> None:
    assert "whole number" in refusal_of_json({name: 5.0}, STYLE_PARSER).message
    assert "whole number" in refusal({name: b"5.5"}, FORM, STYLE_PARSER).message


@pytest.mark.parametrize("text", ["abc", "null", "undefined", "nan", "1_000", "0x10", "1e99999", "٣", "1" * 1000])
def test_a_form_s_number_must_be_written_plainly(text: str) -> None:
    assert refusal({"duration": text.encode()}, FORM).field == "duration"
    assert refusal({"seed": text.encode() if text != "٣" else "٣".encode()}, FORM).field == "seed"


@pytest.mark.parametrize("value", [0, 1, "true", "yes", [], math.nan])
def test_a_json_boolean_is_true_or_false(value: Any) -> None:
    assert "true or false" in refusal_of_json({"use_sampling": value}).message


@pytest.mark.parametrize("name", ["format", "normalization", "stream_format"])
def test_a_choice_is_one_of_those_listed(name: str) -> None:
    for value in ("aiff", "", 3, ["wav"]):
        error = refusal_of_json({name: value})
        assert error.field == name
        assert "one of" in error.message


@pytest.mark.parametrize("value", [3, True, ["a"], {"a": 1}, "\ud800", "x" * 20_000])
def test_a_prompt_is_a_text_of_bounded_length(value: Any) -> None:
    error = refusal_of_json({"prompt": value})
    assert error.field == "prompt"
    assert len(str(error)) < 300


@pytest.mark.parametrize("parser", [PARSER, MELODY_PARSER, STYLE_PARSER])
def test_null_is_as_if_not_given(parser: RequestParser) -> None:
    names = [*GenerationRequest.model_fields, *ALIASES, "input_audio"]
    request = parse_json({"seed": 1, **{name: None for name in names if name != "seed"}}, parser)
    assert request == parse_json({"seed": 1}, parser)
    assert refusal_of_json({"promt": None}).field == "promt"


@pytest.mark.parametrize("parser", [PARSER, MELODY_PARSER, STYLE_PARSER])
@pytest.mark.parametrize("headers", [FORM, MULTIPART, NO_VALUES])
@pytest.mark.parametrize("empty", [b"", " ", b"\r\n"])
def test_what_is_empty_in_a_form_is_as_if_not_given(
    empty: bytes | str, headers: Mapping[str, str], parser: RequestParser
) -> None:
    names = [*GenerationRequest.model_fields, *ALIASES, "input_audio", "model_version", "multi_band_diffusion"]
    value = empty if isinstance(empty, str) else bytearray(empty)
    request = parse({**dict.fromkeys(names, value), "seed": b"1"}, headers, parser)
    assert request == parse_json({"seed": 1}, parser)
    assert parse(dict.fromkeys(names, value), headers, parser).prompt is None
    assert refusal({"promt": value}, headers, parser).field == "promt"


def test_an_empty_field_of_a_form_gives_way_to_its_other_name() -> None:
    assert parse({"prompt": b"", "text": b"80s pop"}, FORM).prompt == "80s pop"
    assert parse({"prompt": b"", "format": b""}, {**FORM, "url_path": "play/80s pop.mp3"}).prompt == "80s pop"


def test_empty_text_in_json_is_not_a_number_nor_audio() -> None:
    for name in ("duration", "seed", "top_k", "sample_rate", "format"):
        assert refusal_of_json({name: ""}).field == name
    error = refusal_of_json({"continuation": ""})
    assert (error.field, "leave the field out" in error.message) == ("continuation", True)
    assert parse_json({"prompt": ""}).prompt == ""


def test_minus_one_draws_a_seed() -> None:
    seeds = [parse_json({"seed": -1}).seed, parse({"seed": b"-1"}, FORM).seed, parse_json({"seed": None}).seed]
    assert len(set(seeds)) == 3
    assert all(0 <= seed < 2**53 for seed in seeds)
    for wrong in (-2, "-1", True, -1.5):
        assert refusal_of_json({"seed": wrong}).field == "seed"


def test_minus_one_is_the_end_of_the_audio() -> None:
    audio = base64_of(wav_file(1.0))
    for end in (-1, -1.0, None):
        assert parse_json({"continuation": audio, "continuation_end": end}).continuation_end is None
    assert parse({"continuation": audio.encode(), "continuation_end": b"-1"}, FORM).continuation_end is None
    assert parse_json({"continuation_end": -1}).continuation_end is None
    for wrong in (-2, 0):
        assert refusal_of_json({"continuation": audio, "continuation_end": wrong}).field == "continuation_end"


def test_a_start_of_zero_needs_no_audio() -> None:
    assert parse_json({"continuation_start": 0}).continuation is None


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 24_000, 32_000, 44_100, 48_000])
def test_the_sample_rate_is_one_of_the_common_ones(rate: int) -> None:
    assert parse_json({"sample_rate": rate}).sample_rate == rate
    assert parse({"sample_rate": str(rate).encode()}, FORM).sample_rate == rate


@pytest.mark.parametrize("rate", [0, -1, 11_025, 96_000, "24000", 24_000.5, True, [], "48k"])
def test_another_sample_rate_is_refused_with_those_that_are_made(rate: Any) -> None:
    error = refusal_of_json({"sample_rate": rate})
    assert error.field == "sample_rate"
    assert "must be one of 8000, 16000, 22050, 24000, 32000, 44100, 48000, not" in error.message


def test_a_missing_seed_is_drawn_anew_below_two_to_the_53() -> None:
    seeds = [parse_json({}).seed for _ in range(20)] + [parse_json({"seed": None}).seed]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**53 for seed in seeds)


# ---- addresses: a path under /predictions, or a query


def address(**fields: str) -> dict[str, Any]:
    """As TorchServe passes on `GET /<variant>/predict?…`."""
    return {**{name: bytearray(value.encode()) for name, value in fields.items()}, "body": bytearray()}


def test_a_query_is_a_whole_request() -> None:
    row = address(prompt="slow blues é", duration="20", seed="7", format="mp3", stream="true", top_k="10")
    request = parse(row)
    assert (request.prompt, request.duration, request.seed) == ("slow blues é", 20, 7)
    assert (request.format, request.stream, request.top_k) == ("mp3", True, 10)
    assert parse({**row, "model_name": bytearray(b"small")}) == request  # of /invocations


def test_a_query_stands_beside_a_body() -> None:
    json_type = {"content-type": "application/json"}
    request = parse({"seed": b"7", "body": {"prompt": "x", "duration": 2}}, json_type)
    assert (request.prompt, request.duration, request.seed) == ("x", 2, 7)
    assert parse({"seed": b"7", "body": bytearray()}, json_type).seed == 7  # a GET of a client that always says JSON
    assert parse({"seed": b"7", "body": "slow blues"}, {"content-type": "text/plain"}).prompt == "slow blues"
    for body in ({"prompt": "y"}, {"text": "y"}):
        error = refusal({"prompt": b"x", "body": body}, json_type)
        assert (error.field, "more than once" in error.message) == ("prompt", True)


def test_a_query_without_a_parameter_asks_for_the_description() -> None:
    assert PARSER.parse(address(), {}) == DescriptionQuestion()
    assert PARSER.parse({**address(), "model_name": b"small"}, {}) == DescriptionQuestion()


@pytest.mark.parametrize(
    ("row", "headers", "field"),
    [
        (address(prompts="x"), NO_VALUES, "prompts"),
        (address(duration="long"), NO_VALUES, "duration"),
        (address(duration="1000"), NO_VALUES, "duration"),
        (address(stream="perhaps"), NO_VALUES, "stream"),
        (address(prompt="x", text="y"), NO_VALUES, "prompt"),
        ({"prompt": b"\xff", "body": b""}, NO_VALUES, "prompt"),
        ({"model_name": b"small"}, {**FORM, "url_path": ""}, "model_name"),
        ({"body": b"x", "prompt": b"y"}, FORM, "body"),
    ],
)
def test_a_parameter_that_is_wrong_is_named(row: Mapping[str, Any], headers: Mapping[str, str], field: str) -> None:
    assert refusal(row, headers).field == field


def test_an_address_without_a_seed_has_one_of_its_own() -> None:
    play = [parse({"body": b""}, {"url_path": f"play/slow blues.{kind}"}) for kind in ("mp3", "mp3", "flac")]
    query = parse(address(prompt="slow blues", format="mp3", stream="true"))
    assert len({request.seed for request in [*play, query]}) == 1  # the same music in every format
    assert play[0] == play[1]
    assert (
        parse(address(text="slow blues", duration="20")).seed
        == parse(address(duration="20.0", prompt="slow blues")).seed
    )
    others = [
        address(prompt="slow blues", duration="20"),
        address(prompt="fast blues"),
        address(prompt="slow blues", top_k="9"),
    ]
    seeds = {play[0].seed, *(parse(row).seed for row in others)}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**53 for seed in seeds)


def test_the_seed_of_an_address_never_changes() -> None:
    assert parse(address(prompt="slow blues")).seed == 5_680_969_176_925_718


def test_what_has_a_body_draws_its_seed() -> None:
    json_type = {"content-type": "application/json"}
    rows: list[tuple[dict[str, Any], Mapping[str, str]]] = [
        ({"body": {}}, json_type),
        ({"prompt": b"x"}, FORM),
        ({"prompt": b"x"}, NO_VALUES),  # over gRPC
        ({"duration": b"2", "body": {"prompt": "x"}}, json_type),
        ({"body": ""}, {"content-type": "text/plain"}),
    ]
    for row, headers in rows:
        assert parse(row, headers).seed != parse(row, headers).seed


def test_every_field_is_described_with_its_type() -> None:
    for name, schema in {**MELODY_PARSER.fields, **STYLE_PARSER.fields}.items():
        assert schema["description"], name
        assert schema["type"] in ("string", "number", "integer", "boolean"), name
    assert PARSER.fields["prompt"]["aliases"] == ["description", "input", "text"]
    assert PARSER.fields["duration"]["maximum"] == 120
    assert PARSER.fields["cfg_coef_beta"]["nullable"]
    assert "default" not in PARSER.fields["cfg_coef_beta"]


# ---- audio


@pytest.mark.parametrize(
    ("field", "parser"), [("continuation", PARSER), ("melody", MELODY_PARSER), ("style", STYLE_PARSER)]
)
def test_audio_is_an_uploaded_file_or_base64(field: str, parser: RequestParser) -> None:
    data = wav_file(1.0, 22_050, channels=2)
    for request in (
        parse({field: bytearray(data)}, MULTIPART, parser),
        parse({field: base64_of(data).encode()}, FORM, parser),
        parse_json({field: base64_of(data)}, parser),
    ):
        upload = getattr(request, field)
        assert (upload.field, upload.data, upload.min_seconds, upload.max_seconds) == (field, data, 0.02, 20)


@pytest.mark.parametrize(
    ("fields", "field", "complaint"),
    [
        ({"continuation_start": 1.0, "continuation_end": 1.0}, "continuation_end", "at least 0.02 seconds"),
        ({"continuation_start": 1.5, "continuation_end": 1.0}, "continuation_end", "at least 0.02 seconds"),
        ({"continuation_end": 2, "duration": 2}, "duration", "counts the excerpt"),
        ({"continuation_end": 2, "duration": 1.5}, "duration", "counts the excerpt"),
    ],
)
def test_an_excerpt_that_makes_no_sense_is_refused(fields: dict[str, float], field: str, complaint: str) -> None:
    error = refusal_of_json({"continuation": base64_of(wav_file(2.0)), **fields})
    assert error.field == field
    assert complaint in error.message


def test_ends_without_audio_are_refused() -> None:
    assert refusal_of_json({"continuation_start": 1}).field == "continuation_start"
    assert refusal_of_json({"continuation_end": 1}).field == "continuation_end"


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("", "empty"),
        ("not base64!", "not valid base64"),
        ("https://example.org/song.mp3", "links are not fetched; send the file"),
        (base64_of(wav_file(25.0, 8_000)), "at most 200000 bytes"),
        (3, "base64 text or an uploaded file, not 3"),
        (["x"], "not a list"),
    ],
)
@pytest.mark.parametrize(
    ("field", "parser"), [("continuation", PARSER), ("melody", MELODY_PARSER), ("style", STYLE_PARSER)]
)
def test_bad_audio_is_refused_naming_its_field(field: str, parser: RequestParser, value: Any, complaint: str) -> None:
    error = refusal_of_json({field: value}, parser)
    assert error.field == field
    assert re.search(complaint, error.message)


class File(bytearray):
    """One that can be watched."""


@pytest.mark.parametrize("fields", [{}, {"duration": b"-1"}])
def test_what_is_refused_is_not_kept(fields: dict[str, bytes]) -> None:
    file = File(b"https://example.org/no audio at all, but one day perhaps")
    watched = weakref.ref(file)
    assert refusal({"melody": file, **fields}, MULTIPART, MELODY_PARSER).field in ("melody", "duration")
    del file
    gc.collect()
    assert watched() is None


# ---- which model takes what


@pytest.mark.parametrize("value", [base64_of(wav_file(1.0)), "no audio", 3])
@pytest.mark.parametrize(
    ("field", "parser", "complaint"),
    [
        ("melody", PARSER, "(the variants melody, melody-large, stereo-melody, stereo-melody-large); this model takes"),
        ("melody", STYLE_PARSER, "this model takes a `style`"),
        ("style", PARSER, "only models that take a style have it (the variants style); this model takes neither"),
        ("style", MELODY_PARSER, "this model takes a `melody`"),
        ("eval_q", PARSER, "only models that take a style have it"),
        ("excerpt_length", MELODY_PARSER, "only models that take a style have it"),
        ("ds_factor", MELODY_PARSER, "this model takes a `melody`"),
    ],
)
def test_what_another_model_takes_is_refused_with_the_variants_that_take_it(
    field: str, parser: RequestParser, complaint: str, value: Any
) -> None:
    for error in (refusal_of_json({field: value}, parser), refusal({field: str(value).encode()}, FORM, parser)):
        assert error.field == field
        assert complaint in error.message


def test_a_melody_and_a_style_at_once_are_refused_whatever_the_model() -> None:
    both = {"melody": base64_of(wav_file(1.0)), "style": base64_of(wav_file(1.0))}
    assert [refusal_of_json(both, parser).field for parser in (PARSER, MELODY_PARSER, STYLE_PARSER)] == [
        "melody",
        "style",
        "melody",
    ]


def test_a_model_s_fields_are_those_it_takes() -> None:
    style = {"style", "eval_q", "excerpt_length", "ds_factor"}
    assert set(MELODY_PARSER.fields) - set(PARSER.fields) == {"melody"}
    assert set(STYLE_PARSER.fields) - set(PARSER.fields) == style
    assert set(PARSER.fields) == set(GenerationRequest.model_fields) - {"melody"} - style
    assert (MELODY_PARSER.fields["melody"]["max_bytes"], MELODY_PARSER.fields["melody"]["max_seconds"]) == (200_000, 20)
    assert "melody" not in refusal_of_json({"zzz": 1}).message


# ---- style

SHORT_STYLE = base64_of(wav_file(1.0))
MINUTE = base64_of(flac_file(60))
LONG_PARSER = RequestParser(replace(LIMITS, max_duration=120.0, max_upload_seconds=600.0))


def test_a_style_model_takes_how_to_look_at_the_style() -> None:
    request = parse({"style": SHORT_STYLE.encode(), "eval_q": b"6", "excerpt_length": b"1.5"}, FORM, STYLE_PARSER)
    assert (request.eval_q, request.excerpt_length, request.ds_factor) == (6, 1.5, None)


@pytest.mark.parametrize("fields", [{"eval_q": 3}, {"excerpt_length": 3}, {"ds_factor": 15}])
def test_how_to_look_at_a_style_needs_one(fields: dict[str, Any]) -> None:
    error = refusal_of_json(fields, STYLE_PARSER)
    assert error.field == next(iter(fields))
    assert "`style`" in error.message


@pytest.mark.parametrize(
    ("start", "end", "duration"), [(2.0, 31.98, 40.0), (2.04, 32.02, 40.0), (0.0, 0.14, 0.16), (30.02, 60.0, 30.0)]
)
def test_an_excerpt_a_frame_shorter_than_the_window_and_the_clip_can_be_continued(
    start: float, end: float, duration: float
) -> None:
    fields = {"continuation_start": start, "continuation_end": end, "duration": duration}
    assert parse_json({"continuation": MINUTE, **fields}, LONG_PARSER).continuation is not None


@pytest.mark.parametrize(("start", "end"), [(0.0, 30.0), (1.0, 30.99), (None, 59.0)])
def test_an_excerpt_as_long_as_the_window_is_refused_before_it_is_decoded(
    start: float | None, end: float | None
) -> None:
    fields = {"continuation_start": start, "continuation_end": end, "duration": 100.0}
    error = refusal_of_json({"continuation": MINUTE, **fields}, LONG_PARSER)
    assert error.field == "continuation"
    assert "at least a frame (0.02 s) shorter than the model's window of 30 seconds" in error.message


@pytest.mark.parametrize(
    ("fields", "field", "complaint"),
    [
        ({"eval_q": 0}, "eval_q", "from 1 to 6, not 0"),
        ({"eval_q": 7}, "eval_q", "from 1 to 6, not 7"),
        ({"excerpt_length": 0}, "excerpt_length", "above 0"),
        ({"excerpt_length": 30.5}, "excerpt_length", "to 30"),
        ({"ds_factor": 0}, "ds_factor", "from 1 to 1000"),
        (
            {"excerpt_length": 30, "ds_factor": 1},
            "excerpt_length",
            "30 seconds and a ds_factor of 1 make 2250 vectors of style (75 a second / ds_factor), and 512 are the "
            "most; ask for at most 6.827 seconds, or for a ds_factor of at least 5",
        ),
        ({"excerpt_length": 30, "ds_factor": 4}, "excerpt_length", "make 563 vectors"),
    ],
)
def test_a_style_looked_at_out_of_bounds_is_refused(fields: dict[str, Any], field: str, complaint: str) -> None:
    error = refusal_of_json({"style": SHORT_STYLE, **fields}, STYLE_PARSER)
    assert error.field == field
    assert complaint in error.message


@pytest.mark.parametrize(
    "fields", [{"ds_factor": 1}, {"excerpt_length": 30}, {"excerpt_length": 30, "ds_factor": 5}, {"eval_q": 6}]
)
def test_up_to_512_vectors_of_style_are_taken(fields: dict[str, Any]) -> None:
    assert parse_json({"style": SHORT_STYLE, **fields}, STYLE_PARSER).style is not None


# ---- streams


@pytest.mark.parametrize(
    ("fields", "streams"),
    [
        ({}, False),
        ({"stream": False, "stream_format": "audio"}, False),
        ({"stream": True}, True),
        ({"stream_format": "sse"}, True),
        ({"stream": False, "stream_format": "sse", "format": "mp3"}, True),
    ],
)
def test_a_stream_is_asked_for_by_name_or_by_its_events(fields: dict[str, Any], streams: bool) -> None:
    assert parse_json(fields).streams is streams


@pytest.mark.parametrize("fields", [{"stream": True}, {"stream_format": "sse"}])
def test_json_cannot_be_streamed(fields: dict[str, Any]) -> None:
    error = refusal_of_json({"format": "json", **fields})
    assert error.field == "format"
    assert "`stream_format`" in error.message
