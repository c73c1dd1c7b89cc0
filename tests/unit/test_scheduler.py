"""Continuous batching: who runs when changes nothing of what anybody gets."""

from __future__ import annotations

import gc
import pickle
import threading
import weakref
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from handler.engine.messages import Audio, Done, Event, Failed, Job, Progress, Started
from handler.engine.process import _warm_up
from handler.engine.scheduler import Capacity, Scheduler
from handler.errors import ModelDivergedError, RequestError
from handler.lm.decoder import Slot
from handler.musicgen import MusicGen
from handler.params import Clip, GenerationParams
from tests.parity.models import GOLDENS, load


class Stage:
    """A scheduler, and what it said of each job."""

    def __init__(
        self, model: MusicGen, requests: int = 8, rows: int = 16, chunk_frames: int = 20, deterministic: bool = True
    ) -> None:
        self.events: dict[str, list[Event]] = {}
        self.order: list[str] = []
        self.ends: list[str] = []
        self._woken = threading.Semaphore(0)
        capacity = Capacity(requests, rows, 1600, 1510)
        self.scheduler = Scheduler(model, capacity, chunk_frames, 512, self._note, self._woken.release, deterministic)

    def _note(self, job_id: str, event: Event) -> None:
        self.events.setdefault(job_id, []).append(event)
        if isinstance(event, Started):
            self.order.append(job_id)
        if isinstance(event, Done | Failed):
            self.ends.append(job_id)

    def submit(self, *jobs: Job) -> None:
        for job in jobs:
            self.scheduler.submit(job)
            self._woken.acquire()  # its conditions are ready, in the order of the jobs

    def rounds(self, count: int) -> None:
        for _ in range(count):
            self.scheduler.round()

    def finish(self, *job_ids: str) -> None:
        while not all(isinstance(self.events.get(job_id, [None])[-1], Done | Failed) for job_id in job_ids):
            if not self.scheduler.busy:
                assert self._woken.acquire(timeout=60)
            self.scheduler.round()

    def wav(self, job_id: str) -> np.ndarray:
        return np.concatenate([event.wav for event in self.events[job_id] if isinstance(event, Audio)], axis=1)


def job(name: str, duration: float = 1.0, seed: int = 0, text: str | None = "jazz", **params: object) -> Job:
    return Job(name, Clip(text), replace(GenerationParams(duration=duration, seed=seed), **params))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def model() -> MusicGen:
    return load("text_mono")


def alone(model: MusicGen, wanted: Job) -> np.ndarray:
    stage = Stage(model)
    stage.submit(wanted)
    stage.finish(wanted.id)
    return stage.wav(wanted.id)


MIXED = [
    job("short", 0.5, 1, "happy rock"),
    job("none", 1.3, 2, None),
    job("double", 1.1, 3, "loud", cfg_coef_beta=2.0),
    job("greedy", 0.9, 4, "a b c d e f", use_sampling=False),
    job("plain", 2.1, 5, "slow", cfg_coef=1.0),
    job("two step", 0.8, 6, "drums", two_step_cfg=True),
    job("top p", 1.7, 7, "bass", top_p=0.8, temperature=1.3),
]


def test_a_clip_has_the_same_bits_whoever_joins_and_leaves_beside_it(model: MusicGen) -> None:
    expected = {wanted.id: alone(model, wanted) for wanted in MIXED}
    stage = Stage(model, requests=4, rows=8)
    stage.submit(MIXED[0], MIXED[1])
    stage.rounds(9)
    stage.submit(*MIXED[2:5], job("leaver", 30.0, 9))
    stage.rounds(17)
    stage.scheduler.cancel("leaver")
    stage.submit(*MIXED[5:])
    stage.finish(*expected)
    for name, wav in expected.items():
        np.testing.assert_array_equal(stage.wav(name), wav)
    assert not any(isinstance(event, Done) for event in stage.events.get("leaver", []))


@pytest.fixture
def codec_beside(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Audio is decoded in a thread, as on a GPU."""
    with ThreadPoolExecutor(1) as pool:
        monkeypatch.setattr("handler.engine.scheduler.codec_executor", lambda _: pool)
        yield


@pytest.mark.usefixtures("codec_beside")
def test_audio_that_is_decoded_beside_the_steps_is_the_same_and_in_order(
    model: MusicGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(model)
    stage.submit(*MIXED[:3], job("leaver", 30.0, 9))
    stage.rounds(40)
    stage.scheduler.cancel("leaver")
    names = [wanted.id for wanted in MIXED[:3]]
    stage.finish(*names)
    monkeypatch.undo()
    for wanted in MIXED[:3]:
        np.testing.assert_array_equal(stage.wav(wanted.id), alone(model, wanted))
        assert isinstance(stage.events[wanted.id][-1], Done)
    assert not stage.scheduler.decoder.slots


@pytest.mark.parametrize("threaded", [True, False])
def test_a_clip_whose_audio_cannot_be_decoded_fails_alone(
    model: MusicGen, threaded: bool, request: pytest.FixtureRequest
) -> None:
    if threaded:
        request.getfixturevalue("codec_beside")
    stage = Stage(model)
    stage.submit(job("bad", 3.0), MIXED[0])
    bad = next(each for each in stage.scheduler._requests if each.job.id == "bad")
    pushes: list[int] = []

    def fails_on_the_second(codes: torch.Tensor) -> torch.Tensor:
        pushes.append(codes.shape[1])
        if len(pushes) == 2:
            raise WrongError(5, 6)
        return torch.zeros(1, 7)

    bad.audio.push = fails_on_the_second  # type: ignore[method-assign]
    stage.rounds(3)
    bad.preparing = Future()  # as when its next window is being prepared
    stage.finish("bad", "short")
    failed = stage.events["bad"][-1]
    assert isinstance(failed, Failed)
    assert str(failed.error) == "WrongError: 5 6"
    assert len(pushes) == 2
    assert stage.wav("bad").shape[1] == 7
    assert sum(event.wav.shape[1] for event in stage.events["short"] if isinstance(event, Audio)) == 16000
    assert not stage.scheduler.decoder.slots


def test_the_audio_is_that_of_the_offline_api(model: MusicGen) -> None:
    wanted = MIXED[2]
    wav, codes = model.generate_clip(wanted.clip, wanted.params)
    stage = Stage(model)
    stage.submit(wanted)
    stage.finish(wanted.id)
    np.testing.assert_allclose(stage.wav(wanted.id), wav.numpy(), atol=1e-5)
    done = stage.events[wanted.id][-1]
    assert isinstance(done, Done)
    np.testing.assert_array_equal(done.codes, codes.numpy())


def test_audio_comes_chunk_by_chunk_and_progress_with_it(model: MusicGen) -> None:
    stage = Stage(model, chunk_frames=20)
    stage.submit(job("long", 3.0))
    stage.finish("long")
    pieces = [event.wav.shape[1] for event in stage.events["long"] if isinstance(event, Audio)]
    assert len(pieces) >= 7
    assert sum(pieces) == 3 * 32000
    steps = [event.done for event in stage.events["long"] if isinstance(event, Progress)]
    assert steps == sorted(steps)
    assert len(steps) >= 10


def test_music_of_several_windows_goes_on_inside(model: MusicGen) -> None:
    model.max_duration = 2.0
    try:
        wanted = job("long", 5.0, 3)
        wav, _ = model.generate_clip(wanted.clip, wanted.params)
        stage = Stage(model)
        stage.submit(wanted, MIXED[0])
        stage.finish("long", "short")
        np.testing.assert_allclose(stage.wav("long"), wav.numpy(), atol=1e-5)
    finally:
        model.max_duration = 30.0


def test_music_of_several_windows_keeps_its_rows_from_one_to_the_next(model: MusicGen) -> None:
    model.max_duration = 2.0
    try:
        stage = Stage(model, requests=1, rows=2)
        stage.submit(job("long", 5.0), job("short", 0.5))
        stage.finish("long")
        assert stage.order == ["long"]
        stage.finish("short")
        assert stage.ends == ["long", "short"]
    finally:
        model.max_duration = 30.0


def test_conditions_are_encoded_on_one_core_and_leave_the_others_to_the_decode_step(model: MusicGen) -> None:
    scheduler = Stage(model).scheduler
    for pool in (scheduler._preparers, scheduler._followers):
        assert pool.submit(torch.get_num_threads).result() == 1


def test_nobody_overtakes_a_request_that_waits_for_three_rows(model: MusicGen) -> None:
    stage = Stage(model, requests=4, rows=4)
    stage.submit(
        job("two", 1.0), job("three", 0.5, cfg_coef_beta=2.0), job("two more", 0.5), job("one", 0.5, text=None)
    )
    stage.finish("two", "three", "two more", "one")
    assert stage.order == ["two", "three", "two more", "one"]


def test_a_request_that_is_run_again_keeps_its_place(model: MusicGen) -> None:
    stage = Stage(model, requests=1, rows=2)
    first, second, third = (replace(job(name, 0.4), arrival=i) for i, name in enumerate(("first", "second", "third")))
    stage.submit(job("running", 0.4), second, third)
    stage.rounds(3)
    stage.submit(first)
    stage.finish("running", "first", "second", "third")
    assert stage.order == ["running", "first", "second", "third"]


def test_what_is_wrong_with_one_request_ends_only_that_one(model: MusicGen) -> None:
    stage = Stage(model)
    bad = Job("bad", Clip("jazz", continuation=torch.zeros(1, 99999), continuation_sample_rate=32000), MIXED[0].params)
    wordy = job("wordy", text="zz " * 1000)
    stage.submit(MIXED[0], bad, wordy, job("no melody", eval_q=3))
    stage.finish("short", "bad", "wordy", "no melody")
    errors = {name: stage.events[name][-1] for name in ("bad", "wordy", "no melody")}
    fields = {
        name: event.error.field
        for name, event in errors.items()
        if isinstance(event, Failed) and isinstance(event.error, RequestError)
    }
    assert fields == {"bad": "continuation", "wordy": "prompt", "no melody": "eval_q"}
    np.testing.assert_array_equal(stage.wav("short"), alone(model, MIXED[0]))


def test_rows_are_free_again_after_every_way_out(model: MusicGen) -> None:
    stage = Stage(model, requests=2, rows=4)
    for turn in range(3):
        stage.submit(job(f"a{turn}", 0.4), job(f"b{turn}", 20.0))
        stage.rounds(5)
        stage.scheduler.cancel(f"b{turn}")
        stage.finish(f"a{turn}")
    assert not stage.scheduler.busy
    stage.submit(job("last", 0.4), job("beside", 0.4))
    stage.rounds(3)
    assert stage.order[-2:] == ["last", "beside"]
    stage.finish("last", "beside")


class WrongError(Exception):
    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} {other}")


def test_a_request_the_model_raises_on_fails_alone_and_leaves_its_rows(
    model: MusicGen, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(model, requests=2, rows=2)
    prefill = stage.scheduler.decoder._prefill

    def fails_on_the_first(slot: Slot) -> None:
        monkeypatch.setattr(stage.scheduler.decoder, "_prefill", prefill)
        raise WrongError(1, 2)

    monkeypatch.setattr(stage.scheduler.decoder, "_prefill", fails_on_the_first)
    stage.submit(job("bad"), MIXED[0])
    stage.finish("bad", "short")
    failed = pickle.loads(pickle.dumps(stage.events["bad"][-1]))  # as it goes through the engine's pipe
    assert str(failed.error) == "WrongError: 1 2"
    np.testing.assert_array_equal(stage.wav("short"), alone(model, MIXED[0]))


def test_the_audio_of_a_refused_request_is_let_go_of_at_once(model: MusicGen) -> None:
    stage = Stage(model)
    wav = torch.zeros(1, 64000)
    held = weakref.ref(wav)
    refused = replace(job("too long"), clip=Clip("jazz", continuation=wav, continuation_sample_rate=32000))
    gc.disable()
    try:
        stage.submit(refused)
        stage.finish("too long")
        del refused, wav
        assert held() is None
    finally:
        gc.enable()


def test_a_request_the_model_raises_on_while_it_runs_fails_alone_and_leaves_its_rows(model: MusicGen) -> None:
    stage = Stage(model, requests=2, rows=4)
    stage.submit(job("bad", 2.0), MIXED[0])
    stage.rounds(5)

    def fails(*_: object) -> torch.Tensor:
        raise WrongError(3, 4)

    [bad] = [request for request in stage.scheduler._requests if request.job.id == "bad"]
    assert bad.generation is not None
    bad.generation.read = fails  # type: ignore[method-assign, assignment]
    stage.submit(job("next", 0.4), job("after", 0.4))
    stage.finish("bad", "short", "next", "after")
    failed = stage.events["bad"][-1]
    assert isinstance(failed, Failed)
    assert str(failed.error) == "WrongError: 3 4"
    np.testing.assert_array_equal(stage.wav("short"), alone(model, MIXED[0]))
    assert not stage.scheduler.decoder.slots


OVERFLOWS = 3e38
"""A cfg_coef with which guided logits are no numbers."""


def test_a_request_whose_logits_are_not_finite_fails_alone_and_leaves_no_trace_in_its_rows(model: MusicGen) -> None:
    stage = Stage(model, requests=2, rows=4)
    stage.submit(job("bad", 2.0, cfg_coef=OVERFLOWS), MIXED[0])
    stage.submit(job("next", 0.5, 1, "happy rock"))  # in the rows that the first leaves
    stage.finish("bad", "short", "next")
    failed = stage.events["bad"][-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ModelDivergedError)
    assert "not finite" in str(pickle.loads(pickle.dumps(failed.error)))
    assert not any(isinstance(event, Audio | Done) for event in stage.events["bad"])
    np.testing.assert_array_equal(stage.wav("short"), alone(model, MIXED[0]))
    np.testing.assert_array_equal(stage.wav("next"), stage.wav("short"))
    assert not stage.scheduler.decoder.slots


def test_a_request_whose_audio_is_not_finite_ends_with_what_was_sound(model: MusicGen) -> None:
    stage = Stage(model)
    stage.submit(job("bad", 3.0), MIXED[0])
    bad = next(each for each in stage.scheduler._requests if each.job.id == "bad")
    chunks = iter([torch.zeros(1, 7), torch.tensor([[0.0, torch.nan]])])
    bad.audio.push = lambda codes: next(chunks)  # type: ignore[method-assign]
    stage.finish("bad", "short")
    failed = stage.events["bad"][-1]
    assert isinstance(failed, Failed)
    assert isinstance(failed.error, ModelDivergedError)
    assert stage.wav("bad").shape[1] == 7
    assert isinstance(stage.events["short"][-1], Done)


def test_a_model_that_makes_no_numbers_fails_at_its_warm_up() -> None:
    model = MusicGen.get_pretrained(GOLDENS / "text_mono", device="cpu", hub_dir=GOLDENS / "hub")
    assert model.lm.out_norm is not None
    model.lm.out_norm.weight.fill_(OVERFLOWS)
    with pytest.raises(ModelDivergedError, match="its logits are not finite"):
        _warm_up(Stage(model).scheduler)
    model.set_generation_params(duration=30.0)
    with pytest.raises(ModelDivergedError, match="its logits are not finite"):
        model.generate(["jazz"])


def test_a_fault_of_the_device_is_everybody_s(model: MusicGen, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = Stage(model)

    def faults(slot: Slot) -> None:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(stage.scheduler.decoder, "_prefill", faults)
    stage.submit(MIXED[0])
    with pytest.raises(torch.AcceleratorError):
        stage.finish("short")
