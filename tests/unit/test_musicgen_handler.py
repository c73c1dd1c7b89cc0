"""The entry as TorchServe calls it, with an engine of wood."""

from __future__ import annotations

import asyncio
import base64
import copy
import gc
import io
import json
import logging
import math
import os
import time
import weakref
from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import soundfile
from ts import async_service
from ts.context import Context
from ts.service import Service

from handler import streaming
from handler.clip_audio import ClipAudio
from handler.decoder import Decoders
from handler.drain import Drain
from handler.engine.messages import (
    Audio,
    Card,
    DeadlineExceededError,
    Done,
    EngineBusyError,
    EngineDiedError,
    Event,
    Failed,
    Job,
    JobCancelledError,
    Progress,
    Started,
    StyleCard,
)
from handler.engine.ticket import UnreadAudio
from handler.errors import RequestError
from handler.load_failure import failures
from handler.metrics import Metrics
from handler.musicgen_handler import MusicGenHandler, whole_clip
from handler.reply import Reply
from handler.request import Limits
from handler.request_parser import RequestParser
from handler.torchserve_compat import SENT, LockedSocket
from tests.unit.test_metrics import METRICS_YAML, Measurements, context_with
from tests.unit.test_reply_stream import audio_of, told
from tests.unit.test_torchserve_compat import FakeSocket, Message, context_of, messages_in

JSON = {"content-type": "application/json"}
HTTP = {"host": "127.0.0.1"}


class WoodenEngine:
    """Gives the events it was made with, or raises.

    Attributes:
        jobs: what it was asked for.
        left: how many of them it is rid of.
        measured: by the handler it is in.
    """

    def __init__(self, *events: Event | BaseException) -> None:
        self.events = events
        self.jobs: list[Job] = []
        self.left = 0
        self.full = False
        self.style: StyleCard | None = None
        self.measured = Measurements()

    async def generate(self, job: Job, audio: UnreadAudio | None = None) -> AsyncIterator[Event]:
        if self.full:
            yield Failed(EngineBusyError("64 requests are waiting already", 7))
            return
        try:
            self.jobs.append(job if audio is None else replace(job, clip=audio.added_to(job.clip, lambda: True)))
        except RequestError as error:
            yield Failed(error)
            return
        try:
            for event in self.events:
                if isinstance(event, BaseException):
                    raise event
                yield event
        finally:
            self.left += 1

    def describe(self) -> Card:
        return Card(32_000, 1, 50.0, 30.0, ("description",), "cpu", "float32", 8, None, self.style)


DECODERS = Decoders()


def handler_with(*events: Event | BaseException, melody: str | None = None) -> tuple[MusicGenHandler, WoodenEngine]:
    handler = MusicGenHandler()
    engine: Any = WoodenEngine(*events)
    board: Any = SimpleNamespace(cancel=lambda request_id: int(request_id == "running"))
    handler.engine, handler.variant, handler.loaded, handler.board = engine, "small", 1_700_000_000, board
    handler.decoders = DECODERS
    handler.metrics = Metrics(engine.measured, "small", "17")
    handler.drain = Drain(Path("nowhere"), "small", "1.0")
    handler.parser = RequestParser(Limits(120.0, 600.0, 512, 1_000_000, 600.0, 50.0, 30.0, melody))
    return handler, engine


def handled(handler: MusicGenHandler, row: Mapping[str, Any], headers: Mapping[str, Any]) -> Message:
    """The first message of the reply, with the whole reply's body."""
    raw: Any = FakeSocket()
    of_predictions = {"explain": "False"} if "url_path" in headers else {}
    context: Context = context_of({**headers, **of_predictions}, LockedSocket(raw))
    assert asyncio.run(handler.handle([copy.deepcopy(dict(row))], context)) == [SENT]
    messages = messages_in(raw.data)
    messages[0].body = b"".join(message.body for message in messages)
    assert messages[-1].headers["ts_stream_next"] == "false"
    return messages[0]


CLIP = (Started(), Audio(np.zeros((1, 640), np.float32)), Done(np.zeros((4, 1), np.int64)))


def outcomes(engine: WoodenEngine) -> list[str]:
    return [each.labels[2] for each in engine.measured if each.name == "musicgen_requests_total"]


def test_a_request_goes_through_the_stages_to_a_clip() -> None:
    handler, engine = handler_with(*CLIP)
    body = {"prompt": "pop", "duration": 2, "seed": 5, "cfg_coef": 1.5, "top_k": 10, "format": "pcm"}
    message = handled(handler, {"body": body}, {**JSON, "x-request-id": "mine"})
    assert (message.status, message.headers["x-seed"], len(message.body)) == (200, "5", 1280)
    [job] = engine.jobs
    assert (job.id, job.clip.description) == ("mine", "pop")
    assert (job.params.duration, job.params.seed, job.params.cfg_coef, job.params.top_k) == (2, 5, 1.5, 10)
    assert not job.stream
    assert outcomes(engine) == ["ok"]
    assert engine.measured.of("audio_seconds_total") == [2.0]


def test_a_request_s_timeout_counts_from_its_arrival() -> None:
    handler, engine = handler_with(*CLIP)
    before = time.monotonic()
    handled(handler, {"body": {"timeout": 100}}, JSON)
    assert before + 100 <= engine.jobs[0].deadline <= time.monotonic() + 100


def test_a_null_or_empty_prompt_is_unconditional() -> None:
    for body in ({"prompt": ""}, {"prompt": None}, {}):
        handler, engine = handler_with(*CLIP)
        handled(handler, {"body": body}, JSON)
        assert engine.jobs[0].clip.description is None


def test_both_ways_of_asking_give_the_description() -> None:
    handler, _ = handler_with()
    got = json.loads(handled(handler, {"body": b""}, HTTP).body)
    assert got == json.loads(handled(handler, {}, {"describe": "True"}).body)
    assert (got["variant"], got["sample_rate"], got["channels"]) == ("small", 32_000, 1)
    assert got["fields"]["duration"]["maximum"] == got["max_duration"] == 120
    assert got["conditioners"] == ["description"]


def flac_of(seconds: float) -> str:
    buffer = io.BytesIO()
    soundfile.write(buffer, np.tile(np.linspace(-0.5, 0.5, 8_000), (2, math.ceil(seconds))).T, 8_000, format="FLAC")
    return base64.b64encode(buffer.getvalue()).decode()


def test_a_melody_reaches_the_engine_as_far_as_it_can_be_heard() -> None:
    handler, engine = handler_with(*CLIP, melody="chroma")
    for seconds in (5, 90):
        body = {"melody": flac_of(seconds), "duration": 10}
        assert handled(handler, {"body": body}, JSON).status == 200
    short, long = (job.clip for job in engine.jobs)
    assert short.melody is not None
    assert long.melody is not None
    assert (short.melody.shape, long.melody.shape) == ((1, 5 * 32_000), (1, 70 * 32_000))
    assert short.melody_sample_rate == long.melody_sample_rate == 32_000


def test_an_excerpt_of_a_style_reaches_the_engine_with_how_to_look_at_it() -> None:
    handler, engine = handler_with(*CLIP, melody="style")
    engine.style = StyleCard(32_000, 3.0, True, 6)
    body = {"style": flac_of(90), "eval_q": 2, "excerpt_length": 1.5, "ds_factor": 5, "cfg_coef_beta": 4.0}
    assert handled(handler, {"body": body}, JSON).status == 200
    [job] = engine.jobs
    assert job.clip.melody is not None
    assert job.clip.melody.shape == (1, 48_000)
    params = job.params
    assert (params.eval_q, params.excerpt_length, params.ds_factor, params.cfg_coef_beta) == (2, 1.5, 5, 4.0)


def test_the_part_to_continue_reaches_the_engine() -> None:
    handler, engine = handler_with(*CLIP)
    body = {"continuation": flac_of(90), "continuation_start": 88, "continuation_end": 89.5, "melody": None}
    assert handled(handler, {"body": body}, JSON).status == 200
    [job] = engine.jobs
    assert job.clip.continuation is not None
    assert (job.clip.continuation.shape, job.clip.continuation_sample_rate) == ((1, 48_000), 32_000)
    assert job.clip.melody is None


@pytest.mark.parametrize("form", [True, False])
def test_what_was_uploaded_is_let_go_of_while_the_clip_is_made(form: bool) -> None:
    async def ask() -> None:
        handler, engine = handler_with(melody="chroma")
        service = Service("small", "nowhere", {}, handler.handle, 0, 1, metrics_cache=MagicMock())
        audio = bytearray(base64.b64decode(flac_of(5)))
        body = {"melody": base64.b64encode(audio).decode()}
        parameters = [
            {"name": "melody" if form else "body", "value": audio if form else body, "contentType": "application/json"}
        ]
        kind = b"multipart/form-data; boundary=x" if form else b"application/json"
        headers = [{"name": b"content-type", "value": kind}]
        batch = [{"requestId": b"1", "headers": headers, "parameters": parameters}]

        async def generate(job: Job, audio_of_it: ClipAudio) -> AsyncIterator[Event]:
            request = weakref.ref(audio_of_it.request)
            del audio_of_it
            yield Started()
            async with asyncio.timeout(10):
                while request() is not None:
                    await asyncio.sleep(0.01)
            assert not (audio if form else body)
            yield Failed(JobCancelledError("was cancelled"))

        engine.generate = generate  # type: ignore[assignment,method-assign]
        service.set_cl_socket(LockedSocket(FakeSocket()))  # type: ignore[arg-type]
        await async_service.predict(service, batch)
        assert batch[0]["parameters"] is parameters
        assert outcomes(engine) == ["cancelled"]

    gc.disable()
    try:
        asyncio.run(ask())
    finally:
        gc.enable()


def test_audio_that_turns_out_damaged_is_the_client_s_error() -> None:
    handler, engine = handler_with(*CLIP, melody="chroma")
    damaged = base64.b64encode(base64.b64decode(flac_of(5))[:9_000]).decode()
    message = handled(handler, {"body": {"melody": damaged}}, JSON)
    assert message.status == 400
    assert json.loads(message.body)["error"]["field"] == "melody"
    assert not engine.jobs


def test_a_full_engine_refuses_before_any_audio_is_decoded() -> None:
    handler, engine = handler_with(*CLIP, melody="chroma")
    engine.full = True
    damaged = base64.b64encode(base64.b64decode(flac_of(5))[:9_000]).decode()
    message = handled(handler, {"body": {"melody": damaged}}, JSON)
    assert (message.status, message.headers["retry-after"]) == (503, "7")
    assert not engine.jobs


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (Failed(EngineBusyError("64 requests are waiting already", 3)), 503),
        (Failed(RequestError("prompt", "must be shorter")), 400),
        (Failed(DeadlineExceededError("its timeout passed")), 504),
        (Failed(JobCancelledError("was cancelled")), 499),
        (Failed(RuntimeError("CUDA error: out of memory")), 500),
        (MemoryError(), 500),
        (asyncio.CancelledError(), 500),
        (SystemExit(1), 500),
    ],
)
@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"stream_format": "sse"}])
def test_nothing_escapes_handle_and_every_failure_is_a_json_reply(
    event: Event | BaseException, status: int, fields: dict[str, Any]
) -> None:
    handler, engine = handler_with(event)
    message = handled(handler, {"body": fields}, JSON)
    error = json.loads(message.body)["error"]
    assert (message.status, error["code"], message.headers["content-type"]) == (status, status, "application/json")
    assert outcomes(engine) == [error["type"]]
    assert engine.left == 1


def test_an_engine_that_gives_no_audio_is_a_json_error_too() -> None:
    handler, _ = handler_with(Progress(1, 2))
    assert handled(handler, {"body": {}}, JSON).status == 500


def test_a_reply_that_cannot_be_encoded_is_a_json_reply_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> Reply:
        raise RuntimeError("no encoder")

    monkeypatch.setattr("handler.musicgen_handler.clip_reply", broken)
    handler, _ = handler_with(*CLIP)
    assert handled(handler, {"body": {}}, JSON).status == 500


def test_a_broken_socket_does_not_escape_handle() -> None:
    class BrokenSocket:
        def sendall(self, message: bytes) -> None:
            raise BrokenPipeError

    for fields in ({}, {"stream": True, "normalization": "none"}):
        handler, engine = handler_with(*CLIP)
        socket: Any = BrokenSocket()
        assert asyncio.run(handler.handle([{"body": fields}], context_of(JSON, LockedSocket(socket)))) == [SENT]
        assert (outcomes(engine), engine.left) == (["internal_error"], 1)


def test_each_request_is_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    handler, _ = handler_with(*CLIP)
    handled(handler, {"body": {}}, {**JSON, "x-request-id": "first"})
    handled(handler, {"body": {"top_p": 2}}, {**JSON, "x-request-id": "second"})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" in ")[0] for line in lines] == ["request first: ok", "request second: invalid_request"]


class Upload:
    """What a request's frames hold."""


@pytest.mark.parametrize("way", ["whole", "audio", "events"])
def test_what_a_failed_request_held_is_let_go_of_at_once(way: str) -> None:
    async def events() -> AsyncIterator[Event]:
        yield Failed(RequestError("eval_q", "must be less"))

    async def answer() -> weakref.ref[Upload]:
        upload = Upload()
        try:
            if way == "whole":
                await whole_clip(events())
            elif way == "audio":
                await anext(aiter(streaming._audio(events(), None)))  # type: ignore[arg-type]
            else:
                await streaming._told(await anext(aiter(events())), None, {}, None)  # type: ignore[arg-type]
        except RequestError:
            return weakref.ref(upload)
        raise AssertionError

    gc.disable()
    try:
        assert asyncio.run(answer())() is None
    finally:
        gc.enable()


# ---- streams and the other questions

LOUD = np.linspace(-0.9, 0.9, 1280, dtype=np.float32).reshape(1, -1)
STREAM: tuple[Event, ...] = (Started(), Progress(1, 2), Audio(LOUD[:, :640]), Audio(LOUD[:, 640:]), CLIP[-1])
PCM = {"prompt": "pop", "duration": 0.04, "seed": 5, "format": "pcm", "normalization": "none"}


def test_a_stream_brings_the_bytes_of_the_whole_clip() -> None:
    handler, engine = handler_with(*STREAM)
    whole = handled(handler, {"body": PCM}, JSON)
    message = handled(handler, {"body": {**PCM, "stream": True}}, JSON)
    assert (message.status, message.headers["content-type"], message.body) == (200, "audio/pcm", whole.body)
    told_of = ("x-seed", "x-sample-rate", "x-channels", "x-duration", "x-variant")
    assert {name: message.headers[name] for name in told_of} == {name: whole.headers[name] for name in told_of}
    assert [job.stream for job in engine.jobs] == [False, True]
    assert (outcomes(engine), engine.left) == (["ok", "ok"], 2)


def test_a_player_s_address_streams() -> None:
    handler, engine = handler_with(*STREAM)
    message = handled(handler, {"body": b""}, {**HTTP, "url_path": "play/80s pop.wav"})
    assert (message.status, message.headers["content-type"], message.body[:4]) == (200, "audio/wav", b"RIFF")
    assert (engine.jobs[0].clip.description, engine.jobs[0].stream) == ("80s pop", True)


def test_events_are_streamed_with_the_metadata_at_the_end() -> None:
    handler, _ = handler_with(*STREAM)
    message = handled(handler, {"body": {**PCM, "stream_format": "sse"}}, JSON)
    contents = told(message.body)
    assert message.headers["content-type"] == "text/event-stream"
    assert [content["type"] for content in contents] == ["progress", "audio", "audio", "done"]
    assert audio_of(contents, "audio") == handled(handler, {"body": PCM}, JSON).body
    assert (contents[-1]["seed"], contents[-1]["duration"]) == (5, 0.04)


@pytest.mark.parametrize("ending", [Failed(EngineDiedError("died")), MemoryError()])
def test_a_stream_that_breaks_off_ends_short_and_counts_as_failed(
    ending: Event | BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    handler, engine = handler_with(*STREAM[:3], ending)
    message = handled(handler, {"body": {**PCM, "stream": True}}, JSON)
    assert (message.status, len(message.body)) == (200, 1280)
    assert (outcomes(engine), engine.left) == (["internal_error"], 1)
    assert "failed" in caplog.text


def test_events_that_break_off_end_with_an_error_and_count_as_failed() -> None:
    handler, engine = handler_with(*STREAM[:3], Failed(JobCancelledError("was cancelled")))
    contents = told(handled(handler, {"body": {**PCM, "stream_format": "sse"}}, JSON).body)
    assert [content["type"] for content in contents] == ["progress", "audio", "error"]
    assert contents[-1]["error"]["code"] == 499
    assert outcomes(engine) == ["cancelled"]


SPEECH = {**JSON, "url_path": "v1/audio/speech"}


def test_openai_s_clients_get_speech_and_are_told_what_had_no_effect() -> None:
    handler, engine = handler_with(*STREAM)
    body = {"model": "tts-1", "voice": "alloy", "input": "pop", "duration": 0.04}
    message = handled(handler, {"body": body}, SPEECH)
    assert (message.status, message.headers["content-type"]) == (200, "audio/mpeg")
    assert message.headers["x-no-effect"] == "model, voice"
    assert engine.jobs[0].clip.description == "pop"
    assert "x-no-effect" not in handled(handler, {"body": {"input": "pop"}}, SPEECH).headers


def test_openai_s_events_are_told_in_its_own_words() -> None:
    handler, _ = handler_with(*STREAM)
    body = {"input": "pop", "voice": "alloy", "stream_format": "sse", "response_format": "pcm", "duration": 0.04}
    message = handled(handler, {"body": body}, SPEECH)
    assert message.headers["x-no-effect"] == "voice"
    assert {content["type"] for content in told(message.body)} == {"speech.audio.delta", "speech.audio.done"}


def test_the_one_model_here_is_listed() -> None:
    handler, engine = handler_with()
    content = json.loads(handled(handler, {"body": b""}, {**HTTP, "url_path": "v1/models"}).body)
    assert [(model["id"], model["created"]) for model in content["data"]] == [("small", 1_700_000_000)]
    assert not engine.jobs


def test_a_cancel_says_whether_there_was_such_a_request() -> None:
    handler, engine = handler_with()
    headers = {**HTTP, "url_path": "cancel"}
    found = handled(handler, {"body": b""}, {**headers, "x-request-id": "running"})
    assert (found.status, json.loads(found.body)) == (200, {"cancelled": "running"})
    lost = handled(handler, {"body": {"id": "lost"}}, {**JSON, **headers})
    error = json.loads(lost.body)["error"]
    assert (lost.status, error["type"], error["field"]) == (404, "unknown_request", "id")
    assert "lost" in error["message"]
    assert outcomes(engine) == ["ok", "unknown_request"]


def test_a_draining_worker_takes_no_more_and_says_when_to_come_back(tmp_path: Path) -> None:
    handler, engine = handler_with(*STREAM)
    handler.drain = Drain(tmp_path, "small", "1.0")
    (tmp_path / "draining").mkdir()
    (tmp_path / "draining" / "server").touch()
    message = handled(handler, {"body": {}}, JSON)
    assert (message.status, message.headers["retry-after"]) == (503, "5")
    assert not engine.jobs
    assert handled(handler, {"body": b""}, HTTP).status == 503  # a router that asks sends it nothing more
    assert handled(handler, {}, {"describe": "True"}).status == 200


def test_a_stream_over_grpc_is_refused_in_one_message() -> None:
    handler, engine = handler_with(*STREAM)
    message = handled(handler, {"stream": bytearray(b"true")}, {"stream": {"content-type": ""}})
    assert json.loads(message.body)["error"]["field"] == "stream"
    assert not engine.jobs


@pytest.mark.parametrize(
    ("fields", "fits"),
    [
        ({"duration": b"65"}, True),
        ({"duration": b"66"}, False),
        ({"duration": b"50", "format": b"json"}, False),
        ({"duration": b"66", "format": b"flac"}, False),
        ({"duration": b"120", "format": b"mp3"}, True),
        ({"duration": b"120", "format": b"ogg"}, True),
    ],
)
def test_a_clip_too_long_for_a_grpc_client_is_refused_before_it_is_made(fields: dict[str, bytes], fits: bool) -> None:
    handler, engine = handler_with(*STREAM)
    message = handled(handler, fields, {name: {"content-type": ""} for name in fields})
    assert bool(engine.jobs) == fits
    if not fits:
        error = json.loads(message.body)["error"]
        assert (message.status, error["field"]) == (400, "duration")
        assert "gRPC clients accept 4 MiB; ask for mp3 or ogg" in error["message"]
    assert handled(handler, {"body": {"duration": 120}}, JSON).status == 200


def test_a_clip_says_that_no_part_of_it_can_be_asked_for() -> None:
    handler, _ = handler_with(*STREAM)
    for headers in (HTTP, {**HTTP, "range": "bytes=100-200"}):
        message = handled(handler, {"prompt": b"pop", "body": b""}, headers)
        assert (message.status, message.headers["accept-ranges"]) == (200, "none")


def test_a_stream_that_fails_before_its_first_byte_is_an_error_with_its_status() -> None:
    handler, engine = handler_with(Started(), Failed(DeadlineExceededError("late")))
    message = handled(handler, {"body": {"stream": True}}, JSON)
    assert message.status == 504
    assert json.loads(message.body)["error"]["type"] == "deadline_exceeded"
    assert outcomes(engine) == ["deadline_exceeded"]


def test_who_asks_a_model_that_cannot_be_loaded_is_told_the_cause(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped: list[tuple[str, str]] = []
    monkeypatch.setattr("handler.musicgen_handler.lock_worker_socket", lambda: None)
    monkeypatch.setattr("handler.musicgen_handler.stop_workers", lambda *version: stopped.append(version))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "failed").mkdir()
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    asked: list[tuple[dict[str, Any], dict[str, str]]] = [({"body": {}}, JSON), ({}, {"describe": "True"})]
    good = {"asyncCommunication": True}
    for config, batch_size, cause in (
        ({**good, "handler": {"x": 1}}, 1, "`handler.x`"),
        (good, 1, "state_dict.bin does not exist"),
        (good, 8, "the batch size is 8"),
        (good, 2, "register it with batch_size=1"),
        (None, 1, "needs `asyncCommunication: true`"),
        ({"asyncCommunication": False}, 1, "needs `asyncCommunication: true`"),
        ({**good, "continuousBatching": True}, 1, "no `continuousBatching`"),
    ):
        manifest = {"model": {"modelVersion": "1.0"}}
        context = Context("small", str(tmp_path), manifest, batch_size, None, "0.12.0", model_yaml_config=config)
        context.metrics = context_with(METRICS_YAML).metrics
        handler = MusicGenHandler()
        stopped.clear()
        handler.initialize(context)
        assert bool(stopped) == ("batch" in cause or "asyncC" in cause or "continuous" in cause)
        assert cause in failures(tmp_path, "small", "1.0")[os.getpid()]
        for row, headers in asked:
            message = handled(handler, row, headers)
            error = json.loads(message.body)["error"]
            assert (error["code"], error["type"]) == (503, "unavailable")
            assert cause in error["message"]
            assert "register it again" in error["message"] or stopped
            assert "Traceback" not in error["message"]
