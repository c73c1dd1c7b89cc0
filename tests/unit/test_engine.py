"""The engine's process: its deaths cost a pause, and no client hangs."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest

from handler.engine.engine import Engine
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
)
from handler.engine.process import ModelSpec
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
    engine = Engine(spec(), max_queue=3)
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
        jobs = [job(f"j{i}", 2.0, seed=i) for i in range(6)]
        expected = [wav_of(await events_of(engine, wanted)) for wanted in jobs]
        outcomes = await asyncio.gather(
            events_of(engine, jobs[0], kill_once(Progress)), *(events_of(engine, wanted) for wanted in jobs[1:])
        )
        assert any(isinstance(event, Restarted) for event in outcomes[0])
        for events, wav in zip(outcomes, expected, strict=True):
            np.testing.assert_array_equal(wav_of(events), wav)

    asyncio.run(run())


def test_a_request_that_runs_at_two_deaths_is_given_up(engine: Engine) -> None:
    error = error_of(asyncio.run(events_of(engine, job("poison", 5.0), kill_each_life())))
    assert isinstance(error, EngineDiedError)
    assert "twice" in str(error)


def test_a_request_that_kills_the_engine_costs_the_others_beside_it_only_time(engine: Engine) -> None:
    async def run() -> None:
        beside = [job(f"b{i}", 1.0, seed=i) for i in range(3)]
        expected = [wav_of(await events_of(engine, wanted)) for wanted in beside]
        poison, *others = await asyncio.gather(
            events_of(engine, job("poison", 5.0), kill_each_life()), *(events_of(engine, wanted) for wanted in beside)
        )
        assert isinstance(error_of(poison), EngineDiedError)
        for events, wav in zip(others, expected, strict=True):
            np.testing.assert_array_equal(wav_of(events), wav)

    asyncio.run(run())


def test_a_stream_under_way_is_broken_off_and_not_begun_anew(engine: Engine) -> None:
    events = asyncio.run(events_of(engine, job("stream", 10.0, stream=True), kill_once(Audio)))
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


def test_a_deadline_frees_the_rows(engine: Engine) -> None:
    async def run() -> None:
        started = time.monotonic()
        late = [events_of(engine, job(f"late{i}", 30.0, deadline=started + 1.0)) for i in range(4)]
        for events in await asyncio.gather(*late):
            assert isinstance(error_of(events), DeadlineExceededError)
        wav_of(await events_of(engine, job("after")))

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_tells_why(tmp_path: Path) -> None:
    with pytest.raises(
        EngineUnavailableError, match=r"the model could not be loaded: CheckpointError: .*state_dict.bin"
    ):
        Engine(spec(checkpoint=tmp_path), max_queue=1).start()


@pytest.mark.parametrize(
    ("mebibytes", "complaint"),
    [
        (1, r"the model's weights take \d+ MiB, and 1 MiB is the `memory_budget`"),
        (14, r"the keys and values of one request take \d+ MiB, and beside the model there is room for \d MiB"),
    ],
)
def test_a_budget_too_small_is_refused_with_the_numbers(mebibytes: int, complaint: str) -> None:
    with pytest.raises(EngineUnavailableError, match=complaint):
        Engine(spec(memory_budget=mebibytes * 2**20), max_queue=1).start()
