"""Whatever is sent, the answer is a valid request or an error that is the client's."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

import numpy as np
import pytest
import soundfile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from handler.clip_audio import audio_of
from handler.decoder import Decoders
from handler.engine.messages import Card, StyleCard
from handler.errors import RequestError
from handler.musicgen_handler import params_of
from handler.params import Clip
from handler.question import CancelQuestion, ClipQuestion
from handler.reply import error_reply
from handler.request import ALIASES, GenerationRequest, Limits
from handler.request_parser import CLIENT_ID, RequestParser

pytestmark = pytest.mark.faults

PARSERS = {
    "melody": RequestParser(Limits(120.0, 600.0, 512, 100_000, 10.0, 50.0, 30.0, "chroma")),
    "style": RequestParser(Limits(120.0, 600.0, 512, 100_000, 10.0, 50.0, 30.0, "style")),
    "continuation": RequestParser(Limits(120.0, 600.0, 512, 100_000, 10.0, 50.0, 30.0)),
}
CARD = Card(32_000, 1, 50.0, 30.0, (), "cpu", "float32", 8, "style", StyleCard(32_000, 3.0, False, 6))
NAMES = [*GenerationRequest.model_fields, *ALIASES, "input_audio", "model_version", "multi_band_diffusion", "version"]
DECODERS = Decoders()
FUZZ = settings(
    max_examples=600, deadline=None, database=None, suppress_health_check=list(HealthCheck), derandomize=True
)


def encoded(container: str, subtype: str) -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.sin(np.arange(4_800) / 9), 48_000, format=container, subtype=subtype)
    return buffer.getvalue()


FILES = [
    encoded(*kind)
    for kind in [("WAV", "PCM_16"), ("WAV", "FLOAT"), ("FLAC", "PCM_16"), ("OGG", "OPUS"), ("MP3", "MPEG_LAYER_III")]
]


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    data = bytearray(draw(st.sampled_from(FILES)))
    for _ in range(draw(st.integers(0, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.integers(0, len(data)))]) if draw(st.booleans()) else bytes(data)


def nested(depth: int, inner: Any) -> Any:
    for _ in range(depth):
        inner = [inner] if depth % 2 else {"a": inner}
    return inner


anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([0, -1, 2**53, 2**63, 10**40, -(10**400)])
    | st.floats()
    | st.text(max_size=40)
    | st.sampled_from(["\ud800", "\x00", "wav", "true", "NaN", "1e400", "data:;base64,", "AAAA", "x" * 20_000]),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=5), children, max_size=3),
    max_leaves=5,
)
values = (
    anything
    | st.builds(nested, st.integers(100, 900), st.none())
    | st.builds(lambda data: base64.b64encode(data).decode(), damaged_files())
    | st.builds(lambda data: base64.b64encode(data).decode()[1:], damaged_files())
)
names = st.sampled_from(NAMES) | st.text(max_size=10)
fields = st.dictionaries(names, values, max_size=4)
bodies = fields | st.builds(lambda inner, outer: {**outer, "input": inner}, fields, fields)
form_values = (
    st.binary(max_size=50)
    | damaged_files()
    | st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass"))
    | st.sampled_from([b"", b"1", b"-1", b"nan", b"1e999", b"true", b"wav", b"9" * 5000])
).map(bytearray)
form_rows = st.dictionaries(names, form_values | values, max_size=4)
content_types = st.sampled_from(
    [
        "",
        "application/json",
        "APPLICATION/JSON;charset=x",
        "text/plain",
        "text/html",
        "audio/wav",
        "multipart/form-data; boundary=x",
        "application/x-www-form-urlencoded",
        ";",
        "\x00",
    ]
)
parsers = st.sampled_from([*PARSERS.values()])
paths = st.sampled_from(["", "/", "play/x.mp3", "play/.", "play/", "play/x.json", "../..", "play/\ud800.wav", "v1/x"])
our_names = st.sampled_from(["input", "response_format", "stream_format", "voice", "id"]) | names
our_fields = st.dictionaries(our_names, values, max_size=4)
our_rows = st.dictionaries(our_names, form_values | values, max_size=4)
our_paths = st.sampled_from(["v1/audio/speech", "v1/models", "cancel"])


def clip_of(question: ClipQuestion) -> Clip:
    clip, audio = Clip(question.request.prompt), audio_of(question.request, CARD, DECODERS)
    return clip if audio is None else audio.added_to(clip)


def check(row: dict[str, Any], headers: dict[str, str], parser: RequestParser) -> None:
    try:
        question = parser.parse(row, headers)
        clip = clip_of(question) if isinstance(question, ClipQuestion) else None
    except RequestError as error:
        reply = error_reply(error, "id")
        assert reply.status in (400, 404, 415)
        content = json.loads(reply.body)["error"]
        assert content["code"] == reply.status
        assert 0 < len(content["message"]) < 1000
        assert content["field"] is None or isinstance(content["field"], str)
        return
    if isinstance(question, CancelQuestion):
        assert CLIENT_ID.fullmatch(question.request_id)
    if isinstance(question, ClipQuestion):
        request = question.request
        assert 0.02 <= request.duration <= 120
        assert 0 <= request.seed < 2**63
        assert not (request.streams and request.format == "json")
        assert request.sample_rate is None or 8_000 <= request.sample_rate <= 48_000
        params_of(request)
        (request.prompt or "").encode()
        assert clip is not None
        for wav, rate in (
            (clip.melody, clip.melody_sample_rate),
            (clip.continuation, clip.continuation_sample_rate),
        ):
            if wav is not None and rate is not None:
                assert wav.isfinite().all()
                assert 0.02 <= wav.shape[-1] / rate < 10.1


@FUZZ
@given(bodies, parsers)
def test_any_json_object_is_answered(body: dict[str, Any], parser: RequestParser) -> None:
    check({"body": body}, {"content-type": "application/json"}, parser)


@FUZZ
@given(
    st.binary(max_size=200) | anything.map(lambda value: json.dumps(value).encode()), content_types, paths | our_paths
)
def test_any_body_of_any_type_at_any_path_is_answered(body: bytes, content_type: str, path: str) -> None:
    check({"body": bytearray(body)}, {"content-type": content_type, "url_path": path}, PARSERS["style"])


@FUZZ
@given(form_rows, content_types, parsers)
def test_any_form_is_answered(row: dict[str, Any], content_type: str, parser: RequestParser) -> None:
    check(row, {"content-type": content_type}, parser)


@FUZZ
@given(st.builds(lambda body: {"body": body}, our_fields) | our_rows, content_types, our_paths, st.text(max_size=5))
def test_anything_asked_in_another_shape_is_answered(
    row: dict[str, Any], content_type: str, path: str, request_id: str
) -> None:
    content_type = "application/json" if isinstance(row.get("body"), dict) else content_type
    check(row, {"content-type": content_type, "url_path": path, "x-request-id": request_id}, PARSERS["melody"])


@FUZZ
@given(damaged_files(), st.sampled_from([*PARSERS]))
def test_any_damaged_upload_is_answered(data: bytes, field: str) -> None:
    row = {field: bytearray(data), "duration": bytearray(b"20")}
    check(row, {"content-type": "multipart/form-data; boundary=x"}, PARSERS[field])
