"""The engine's process: its deaths cost a pause, and no client hangs."""

from __future__ import annotations

import asyncio
import gc
import multiprocessing
import os
import pickle
import signal
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from handler.engine import process
from handler.engine.engine import READERS, Engine
from handler.engine.messages import (
    Audio,
    DeadlineExceededError,
    Done,
    EngineBusyError,
    EngineDiedError,
    EngineUnavailableError,
    Event,
    Failed,
    Job,
    JobCancelledError,
    Progress,
    Restarted,
    Started,
    receive,
    send,
)
from handler.engine.spec import ModelSpec
from handler.errors import RequestError
from handler.params import Clip, GenerationParams
from tests.parity.models import GOLDENS


def spec(**changes: object) -> ModelSpec:
    values: dict[str, object] = {
        "checkpoint": GOLDENS / "text_mono",
        "hub_dir": GOLDENS / "hub",
        "device": "cpu",
        "dtype": None,
        "threads": 1,
        "max_concurrency": 4,
        "memory_budget": None,
        "max_prompt_tokens": 512,
        "chunk_seconds": 0.5,
    }
    return ModelSpec(**{**values, **changes})  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = Engine(spec(), max_queue=3, audio_budget=2**20)
    engine.start()
    yield engine
    process = engine_process()
    engine.close()
    assert process is None or not process.is_running()


def engine_process() -> psutil.Process | None:
    children = [p for p in psutil.Process().children() if "spawn_main" in " ".join(p.cmdline())]
    return children[-1] if children else None


def kill_engine() -> None:
    process = engine_process()
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)


def job(name: str, duration: float = 0.5, seed: int = 0, **options: object) -> Job:
    return Job(name, Clip("jazz"), GenerationParams(duration=duration, seed=seed), **options)  # type: ignore[arg-type]


async def events_of(engine: Engine, wanted: Job, on_event: Callable[[Event], None] = lambda event: None) -> list[Event]:
    events = []
    async for event in engine.generate(wanted):
        events.append(event)
        on_event(event)
    return events


def wav_of(events: list[Event]) -> np.ndarray:
    assert isinstance(events[-1], Done), events[-1]
    restart = max((i for i, event in enumerate(events) if isinstance(event, Restarted)), default=-1)
    return np.concatenate([event.wav for event in events[restart + 1 :] if isinstance(event, Audio)], axis=1)


def error_of(events: list[Event]) -> Exception:
    assert isinstance(events[-1], Failed), events[-1]
    return events[-1].error


def kill_once(kind: type[Event]) -> Callable[[Event], None]:
    """Kills the engine at the first event of a kind."""
    pending = [kind]

    def on_event(event: Event) -> None:
        if pending and isinstance(event, pending[0]):
            pending.clear()
            kill_engine()

    return on_event


def kill_each_life() -> Callable[[Event], None]:
    """Kills each engine that begins with a job and makes progress."""
    begun = []

    def on_event(event: Event) -> None:
        if isinstance(event, Started):
            begun.append(event)
        elif isinstance(event, Progress) and begun:
            begun.clear()
            kill_engine()

    return on_event


def test_a_running_request_is_run_again_after_a_death_and_a_waiting_one_still_runs(engine: Engine) -> None:
    async def run() -> None:
        jobs = [job(f"j{i}", 2.0 if i else 10.0, seed=i) for i in range(6)]
        expected = [wav_of(await events_of(engine, wanted)) for wanted in jobs]
        outcomes = await asyncio.gather(
            events_of(engine, jobs[0], kill_once(Progress)), *(events_of(engine, wanted) for wanted in jobs[1:])
        )
        assert any(isinstance(event, Restarted) for event in outcomes[0])
        for events, wav in zip(outcomes, expected, strict=True):
            np.testing.assert_array_equal(wav_of(events), wav)

    asyncio.run(run())


def test_a_request_that_runs_alone_at_two_deaths_is_given_up(engine: Engine) -> None:
    error = error_of(asyncio.run(events_of(engine, job("poison", 30.0), kill_each_life())))
    assert isinstance(error, EngineDiedError)
    assert "each time it ran this request" in str(error)


def test_a_request_that_kills_the_engine_costs_the_others_beside_it_only_time(engine: Engine) -> None:
    async def run() -> None:
        beside = [job(f"b{i}", 1.0, seed=i) for i in range(3)]
        expected = [wav_of(await events_of(engine, wanted)) for wanted in beside]
        poison, *others = await asyncio.gather(
            events_of(engine, job("poison", 30.0), kill_each_life()), *(events_of(engine, wanted) for wanted in beside)
        )
        assert isinstance(error_of(poison), EngineDiedError)
        for events, wav in zip(others, expected, strict=True):
            np.testing.assert_array_equal(wav_of(events), wav)

    asyncio.run(run())


def test_a_stream_under_way_is_broken_off_and_not_begun_anew(engine: Engine) -> None:
    events = asyncio.run(events_of(engine, job("stream", 30.0, stream=True), kill_once(Audio)))
    assert isinstance(error_of(events), EngineDiedError)
    assert not any(isinstance(event, Restarted) for event in events)


def test_a_full_queue_answers_at_once(engine: Engine) -> None:
    async def run() -> None:
        running = [asyncio.create_task(events_of(engine, job(f"r{i}", 30.0))) for i in range(7)]
        await asyncio.sleep(0.5)
        error = error_of(await events_of(engine, job("one more")))
        assert isinstance(error, EngineBusyError)
        assert error.retry_after >= 1
        assert engine.cancel("r0")
        assert isinstance(error_of(await running[0]), JobCancelledError)
        assert not engine.cancel("r0")
        for task in running[1:]:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        wav_of(await events_of(engine, job("after")))

    asyncio.run(run())


@dataclass
class Recording:
    """Audio to continue, whose reading waits until it may go on."""

    size: int = 2**19
    may_go_on: threading.Event = field(default_factory=threading.Event)
    error: Exception | None = None

    def added_to(self, clip: Clip, wanted: Callable[[], bool]) -> Clip:
        assert self.may_go_on.wait(30)
        if self.error is not None:
            raise self.error
        return replace(clip, continuation=torch.zeros(1, 6_400), continuation_sample_rate=32_000)


async def read_later(engine: Engine, wanted: Job, audio: Recording) -> list[Event]:
    return [event async for event in engine.generate(wanted, audio)]


def test_while_a_request_s_audio_is_read_others_run_and_it_can_be_given_up(engine: Engine) -> None:
    async def run() -> None:
        recordings = [Recording() for _ in range(2)]
        slow = [asyncio.create_task(read_later(engine, job(f"slow{i}"), each)) for i, each in enumerate(recordings)]
        wav_of(await events_of(engine, job("beside")))
        assert engine.status().waiting == 2
        assert engine.cancel("slow0")
        assert isinstance(error_of(await slow[0]), JobCancelledError)
        late = await read_later(engine, job("late", deadline=time.monotonic() + 0.1), Recording(size=1))
        assert isinstance(error_of(late), DeadlineExceededError)
        for recording in recordings:
            recording.may_go_on.set()
        wav_of(await slow[1])

    asyncio.run(run())


def test_the_audio_of_requests_that_are_given_up_is_let_go_of_unread(engine: Engine) -> None:
    async def run() -> None:
        busy = [Recording(size=1) for _ in range(READERS)]
        reading = [asyncio.create_task(read_later(engine, job(f"r{i}"), each)) for i, each in enumerate(busy)]
        await asyncio.sleep(0.1)
        waiting = Recording(size=1)
        held = weakref.ref(waiting)
        events = engine.generate(job("late", deadline=time.monotonic() + 0.1), waiting)
        del waiting
        assert isinstance(error_of([event async for event in events]), DeadlineExceededError)
        assert held() is None
        for recording in busy:
            recording.may_go_on.set()
        for task in reading:
            wav_of(await task)

    gc.disable()
    try:
        asyncio.run(run())
    finally:
        gc.enable()


def test_a_request_whose_audio_is_being_read_outlives_the_engine(engine: Engine) -> None:
    async def run() -> None:
        recording = Recording()
        recording.may_go_on.set()
        expected = wav_of(await read_later(engine, job("alone"), recording))
        recording.may_go_on.clear()
        reading = asyncio.create_task(read_later(engine, job("again"), recording))
        await asyncio.sleep(0.1)
        restarts = engine.status().restarts
        kill_engine()
        while engine.status().restarts == restarts:
            await asyncio.sleep(0.01)
        recording.may_go_on.set()
        events = await reading
        np.testing.assert_array_equal(wav_of(events), expected)
        assert not any(isinstance(event, Restarted) for event in events)

    asyncio.run(run())


def test_audio_that_cannot_be_read_ends_its_request(engine: Engine) -> None:
    recording = Recording(error=RequestError("continuation", "is damaged"))
    recording.may_go_on.set()
    error = error_of(asyncio.run(read_later(engine, job("damaged"), recording)))
    assert isinstance(error, RequestError)
    assert error.field == "continuation"


def test_audio_beyond_the_budget_is_refused_before_it_is_read(engine: Engine) -> None:
    async def run() -> None:
        first = Recording(size=2**20 + 1)  # alone, it is taken: its own bounds have let it in
        waiting = asyncio.create_task(read_later(engine, job("first"), first))
        await asyncio.sleep(0.1)
        error = error_of(await read_later(engine, job("second"), Recording(size=1)))
        assert isinstance(error, EngineBusyError)
        assert "hold 1.0 MiB of audio" in str(error)
        assert "room for 1 MiB (`audio_budget`)" in str(error)
        first.may_go_on.set()
        wav_of(await events_of(engine, job("without audio")))
        wav_of(await waiting)
        first.size = 2**20
        wav_of(await read_later(engine, job("after"), first))

    asyncio.run(run())


def test_a_deadline_frees_the_rows(engine: Engine) -> None:
    async def run() -> None:
        started = time.monotonic()
        late = [events_of(engine, job(f"late{i}", 30.0, deadline=started + 1.0)) for i in range(4)]
        for events in await asyncio.gather(*late):
            assert isinstance(error_of(events), DeadlineExceededError)
        wav_of(await events_of(engine, job("after")))

    asyncio.run(run())


def test_what_keeps_a_new_process_from_starting_may_pass(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    spawn, tries = engine._spawn, iter([OSError("Cannot allocate memory")])

    def spawn_soon() -> None:
        for problem in tries:
            raise problem
        spawn()

    monkeypatch.setattr(engine, "_spawn", spawn_soon)
    wanted = job("kept", 10.0)
    expected = wav_of(asyncio.run(events_of(engine, wanted)))
    np.testing.assert_array_equal(wav_of(asyncio.run(events_of(engine, wanted, kill_once(Progress)))), expected)


def test_while_there_is_no_process_requests_are_told_why_and_later_served(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    spawn, tries = engine._spawn, iter([OSError("Cannot allocate memory")] * 2)

    def spawn_soon() -> None:
        for problem in tries:
            raise problem
        spawn()

    async def run() -> None:
        lost = await events_of(engine, job("lost", 30.0), kill_once(Progress))
        refused = await events_of(engine, job("refused"))
        for events in (lost, refused):
            error = error_of(events)
            assert isinstance(error, EngineUnavailableError)
            assert "Cannot allocate memory" in str(error)
        while isinstance((events := await events_of(engine, job("served")))[-1], Failed):
            await asyncio.sleep(0.1)
        wav_of(events)

    monkeypatch.setattr(engine, "_spawn", spawn_soon)
    asyncio.run(run())


def test_a_job_that_cannot_be_sent_takes_no_place(engine: Engine) -> None:
    async def run() -> None:
        unsendable = Job("unsendable", Clip(lambda: "jazz"), GenerationParams(duration=0.5, seed=0))  # type: ignore[arg-type]
        for _ in range(10):
            with pytest.raises((AttributeError, pickle.PicklingError)):
                await events_of(engine, unsendable)
        assert engine.status().waiting == 0
        wav_of(await events_of(engine, job("after")))

    asyncio.run(run())


def test_audio_goes_through_the_pipe_itself_and_not_through_shared_memory() -> None:
    ours, theirs = multiprocessing.Pipe()
    melody = torch.randn(2, 5000)
    send(ours, Job("audio", Clip("jazz", melody, 32_000), GenerationParams(duration=0.5, seed=0)))
    received = receive(theirs)
    assert torch.equal(received.clip.melody, melody)
    assert not melody.is_shared()
    assert not received.clip.melody.is_shared()


class _Raising:
    """A scheduler whose round raises while it prepares something that takes long."""

    busy, rows = True, 0

    def round(self) -> None:
        ThreadPoolExecutor(1).submit(time.sleep, 300)
        raise ArithmeticError("a decode step failed")


class _Hanging(_Raising):
    """A scheduler whose round never ends."""

    def round(self) -> None:
        time.sleep(300)


def _run_broken(connection: Connection, how: str) -> None:
    _Raising.busy = how != "a command nobody understands"
    scheduler = _Hanging() if how == "a step that hangs" else _Raising()
    process._load = lambda *_: (scheduler, "card")  # type: ignore[assignment]
    process.run(connection, spec(patience=1.0))


@pytest.mark.parametrize("how", ["a step that raises", "a step that hangs", "a command nobody understands"])
def test_what_the_process_cannot_go_on_after_ends_it_at_once(how: str) -> None:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    child = context.Process(target=_run_broken, args=(theirs, how))
    child.start()
    theirs.close()
    if how == "a command nobody understands":
        ours.send_bytes(b"gibberish")
    child.join(60)
    assert child.exitcode == 1


def test_a_model_that_cannot_be_loaded_tells_why(tmp_path: Path) -> None:
    with pytest.raises(
        EngineUnavailableError, match=r"the model could not be loaded: CheckpointError: .*state_dict.bin"
    ):
        Engine(spec(checkpoint=tmp_path), max_queue=1, audio_budget=2**20).start()


@pytest.mark.parametrize(
    ("mebibytes", "complaint"),
    [
        (1, r"the model's weights take \d+ MiB, and 1 MiB is the `memory_budget`"),
        (14, r"the keys and values of one request take \d+ MiB, and beside the model there is room for \d MiB"),
    ],
)
def test_a_budget_too_small_is_refused_with_the_numbers(mebibytes: int, complaint: str) -> None:
    with pytest.raises(EngineUnavailableError, match=complaint):
        Engine(spec(memory_budget=mebibytes * 2**20), max_queue=1, audio_budget=2**20).start()
