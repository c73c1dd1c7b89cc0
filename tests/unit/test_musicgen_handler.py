"""The entry as TorchServe calls it, with an engine of wood."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from ts.context import Context

from handler.engine.messages import Card, EngineBusyError, Event, Failed, Finished, Job, Progress
from handler.errors import CheckpointError, RequestError
from handler.musicgen_handler import MusicGenHandler
from handler.reply import Reply
from handler.request import Limits
from handler.request_parser import RequestParser
from handler.settings import SettingsError
from handler.torchserve_compat import SENT, LockedSocket
from tests.unit.test_torchserve_compat import FakeSocket, Message, context_of, messages_in

JSON = {"content-type": "application/json"}
HTTP = {"host": "127.0.0.1"}


class WoodenEngine:
    """Gives the events it was made with, or raises."""

    def __init__(self, *events: Event | BaseException) -> None:
        self.events = events
        self.jobs: list[Job] = []

    async def generate(self, job: Job) -> AsyncIterator[Event]:
        self.jobs.append(job)
        for event in self.events:
            if isinstance(event, BaseException):
                raise event
            yield event

    def describe(self) -> Card:
        return Card(32_000, 1, 50.0, 30.0, ("description",), "cpu", "float32")


def handler_with(*events: Event | BaseException, melody: str | None = None) -> tuple[MusicGenHandler, WoodenEngine]:
    handler = MusicGenHandler()
    engine: Any = WoodenEngine(*events)
    handler.engine, handler.variant = engine, "small"
    handler.parser = RequestParser(Limits(120.0, 600.0, 512, 1_000_000, 600.0, 50.0, 30.0, melody))
    return handler, engine


def handled(handler: MusicGenHandler, row: Mapping[str, Any], headers: Mapping[str, Any]) -> Message:
    """The first message of the reply, with the whole reply's body."""
    raw: Any = FakeSocket()
    context: Context = context_of(headers, LockedSocket(raw))
    assert asyncio.run(handler.handle([row], context)) == [SENT]
    messages = messages_in(raw.data)
    messages[0].body = b"".join(message.body for message in messages)
    assert messages[-1].headers["ts_stream_next"] == "false"
    return messages[0]


CLIP = Finished(torch.zeros(1, 640), 32_000, 50.0, torch.zeros(4, 1, dtype=torch.long))


def test_a_request_goes_through_the_stages_to_a_clip() -> None:
    handler, engine = handler_with(Progress(1, 2), CLIP)
    body = {"prompt": "pop", "duration": 2, "seed": 5, "cfg_coef": 1.5, "top_k": 10, "format": "pcm"}
    message = handled(handler, {"body": body}, {**JSON, "x-request-id": "mine"})
    assert (message.status, message.headers["x-seed"], len(message.body)) == (200, "5", 1280)
    [job] = engine.jobs
    assert (job.id, job.clip.description) == ("mine", "pop")
    assert (job.params.duration, job.params.seed, job.params.cfg_coef, job.params.top_k) == (2, 5, 1.5, 10)


def test_a_null_or_empty_prompt_is_unconditional() -> None:
    for body in ({"prompt": ""}, {"prompt": None}, {}):
        handler, engine = handler_with(CLIP)
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
    handler, engine = handler_with(CLIP, melody="chroma")
    for seconds in (5, 90):
        body = {"melody": flac_of(seconds), "duration": 10}
        assert handled(handler, {"body": body}, JSON).status == 200
    short, long = (job.clip for job in engine.jobs)
    assert short.melody is not None
    assert long.melody is not None
    assert (short.melody.shape, long.melody.shape) == ((2, 40_000), (2, 70 * 8_000))
    assert short.melody_sample_rate == long.melody_sample_rate == 8_000


def test_a_style_reaches_the_engine_whole_with_how_to_look_at_it() -> None:
    handler, engine = handler_with(CLIP, melody="style")
    body = {"style": flac_of(90), "eval_q": 2, "excerpt_length": 1.5, "ds_factor": 5, "cfg_coef_beta": 4.0}
    assert handled(handler, {"body": body}, JSON).status == 200
    [job] = engine.jobs
    assert job.clip.melody is not None
    assert job.clip.melody.shape == (2, 90 * 8_000)
    params = job.params
    assert (params.eval_q, params.excerpt_length, params.ds_factor, params.cfg_coef_beta) == (2, 1.5, 5, 4.0)


def test_the_part_to_continue_reaches_the_engine() -> None:
    handler, engine = handler_with(CLIP)
    body = {"continuation": flac_of(90), "continuation_start": 88, "continuation_end": 89.5, "melody": None}
    assert handled(handler, {"body": body}, JSON).status == 200
    [job] = engine.jobs
    assert job.clip.continuation is not None
    assert (job.clip.continuation.shape, job.clip.continuation_sample_rate) == ((2, 12_000), 8_000)
    assert job.clip.melody is None


def test_audio_that_turns_out_damaged_is_the_client_s_error() -> None:
    handler, engine = handler_with(CLIP, melody="chroma")
    damaged = base64.b64encode(base64.b64decode(flac_of(5))[:9_000]).decode()
    message = handled(handler, {"body": {"melody": damaged}}, JSON)
    assert message.status == 400
    assert json.loads(message.body)["error"]["field"] == "melody"
    assert not engine.jobs


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (Failed(EngineBusyError(64, 3)), 503),
        (Failed(RequestError("prompt", "must be shorter")), 400),
        (Failed(RuntimeError("CUDA error: out of memory")), 500),
        (MemoryError(), 500),
        (asyncio.CancelledError(), 500),
        (SystemExit(1), 500),
        (Progress(1, 2), 500),
    ],
)
def test_nothing_escapes_handle_and_every_failure_is_a_json_reply(event: Event | BaseException, status: int) -> None:
    handler, _ = handler_with(event)
    message = handled(handler, {"body": {}}, JSON)
    assert message.status == status
    assert json.loads(message.body)["error"]["code"] == status


def test_a_reply_that_cannot_be_encoded_is_a_json_reply_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: object) -> Reply:
        raise RuntimeError("no encoder")

    monkeypatch.setattr("handler.musicgen_handler.clip_reply", broken)
    handler, _ = handler_with(CLIP)
    assert handled(handler, {"body": {}}, JSON).status == 500


def test_a_broken_socket_does_not_escape_handle() -> None:
    class BrokenSocket:
        def sendall(self, message: bytes) -> None:
            raise BrokenPipeError

    handler, _ = handler_with(CLIP)
    socket: Any = BrokenSocket()
    assert asyncio.run(handler.handle([{"body": {}}], context_of(JSON, LockedSocket(socket)))) == [SENT]


def test_each_request_is_one_log_line(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    handler, _ = handler_with(CLIP)
    handled(handler, {"body": {}}, {**JSON, "x-request-id": "first"})
    handled(handler, {"body": {"top_p": 2}}, {**JSON, "x-request-id": "second"})
    lines = [record.getMessage() for record in caplog.records]
    assert [line.split(" in ")[0] for line in lines] == ["request first: ok", "request second: 400 RequestError"]


def test_bad_settings_and_a_bad_checkpoint_fail_the_load_with_their_cause(
    tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("handler.musicgen_handler.lock_worker_socket", lambda: None)
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    context = Context("small", str(tmp_path), None, 1, None, "0.12.0", model_yaml_config={"handler": {"x": 1}})
    with pytest.raises(SettingsError, match=r"handler\.x"):
        MusicGenHandler().initialize(context)
    context.model_yaml_config = None
    with pytest.raises(CheckpointError):
        MusicGenHandler().initialize(context)
