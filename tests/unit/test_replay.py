"""Requests in flight when the engine's process dies: all are retried, and only the one that kills it fails."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import queue
import threading
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import numpy as np
import pytest

from handler.engine import engine as engine_module
from handler.engine.engine import Engine
from handler.engine.messages import (
    Cancel,
    Card,
    Close,
    Done,
    EngineDiedError,
    Event,
    Failed,
    Job,
    Prepared,
    Preparing,
    Ready,
    Restarted,
    Started,
    receive,
    send,
)
from handler.params import Clip, GenerationParams
from tests.unit.test_engine import spec

CONCURRENCY = 8
IN_FLIGHT = 16
STEP_SECONDS = 0.002
CLIP_STEPS = 20


def run_stand_in(connection: Connection, _: object) -> None:
    """Run as many jobs at a time as an engine does. Exit in the middle of one whose text is `poison`, at once when
    one's text is `unreadable`, and once only, beside `bad luck`, as long as the file that its text names is there."""
    commands: queue.SimpleQueue[object] = queue.SimpleQueue()

    def read() -> None:
        try:
            while True:
                commands.put(receive(connection))
        except (EOFError, OSError):
            os._exit(0)

    threading.Thread(target=read, daemon=True).start()
    send(connection, ("", Ready(Card(32_000, 1, 50.0, 30.0, (), "cpu", "float32", CONCURRENCY, None))))
    waiting: list[Job] = []
    running: dict[str, tuple[Job, int]] = {}
    while True:
        while not commands.empty():
            match commands.get():
                case Job() as job:
                    if job.clip.description == "unreadable":
                        os._exit(1)
                    waiting.append(job)
                    waiting.sort(key=lambda each: each.arrival)
                case Cancel(key):
                    running.pop(key, None)
                    waiting = [job for job in waiting if job.id != key]
                case Close():
                    os._exit(0)
        while waiting and len(running) < CONCURRENCY:
            job = waiting.pop(0)
            running[job.id] = (job, 0)
            for event in (Preparing(), Prepared(), Started()):
                send(connection, (job.id, event))
        time.sleep(STEP_SECONDS)
        for key, (job, steps) in list(running.items()):
            text = job.clip.description or ""
            if steps == CLIP_STEPS // 2:
                if text == "poison":
                    os._exit(1)
                if text.startswith("/") and os.path.exists(text):
                    os.unlink(text)
                    os._exit(1)
            if steps == CLIP_STEPS:
                send(connection, (key, Done(np.full((1, 1), job.params.seed))))
                del running[key]
            else:
                running[key] = (job, steps + 1)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    fork = multiprocessing.get_context("fork")  # starts in no time
    monkeypatch.setattr(multiprocessing, "get_context", lambda _: fork)
    monkeypatch.setattr(engine_module, "run", run_stand_in)
    engine = Engine(spec(), max_queue=64, audio_budget=2**20)
    engine.start()
    yield engine
    engine.close()


async def events_of(engine: Engine, seed: int, text: str = "jazz") -> list[Event]:
    job = Job(f"job {seed}", Clip(text), GenerationParams(duration=1.0, seed=seed))
    return [event async for event in engine.generate(job)]


def finished(events: list[Event], seed: int) -> bool:
    return isinstance(events[-1], Done) and events[-1].codes.item() == seed


def died(events: list[Event]) -> bool:
    return isinstance(events[-1], Failed) and isinstance(events[-1].error, EngineDiedError)


@pytest.mark.parametrize(
    "poisons", [(0,), (7,), (8,), (15,), (0, 1), (0, 15), (6, 7), (3, 12), (14, 15)], ids=lambda poisons: str(poisons)
)
def test_of_sixteen_requests_only_those_that_kill_the_engine_fail(engine: Engine, poisons: tuple[int, ...]) -> None:
    async def run() -> list[list[Event]]:
        texts = ["poison" if seed in poisons else "jazz" for seed in range(IN_FLIGHT)]
        return await asyncio.gather(*(events_of(engine, seed, text) for seed, text in enumerate(texts)))

    outcomes = asyncio.run(run())
    assert [seed for seed, events in enumerate(outcomes) if died(events)] == list(poisons)
    assert all(finished(events, seed) for seed, events in enumerate(outcomes) if seed not in poisons)
    assert engine.status().restarts <= len(poisons) * (1 + 2 * 4)  # log2(16) = 4
    assert engine.status().waiting == engine.status().running == 0


def test_a_death_that_no_request_caused_is_one_restart_for_all(engine: Engine, tmp_path: object) -> None:
    bad_luck = f"{tmp_path}/once"
    open(bad_luck, "w").close()

    async def run() -> list[list[Event]]:
        return await asyncio.gather(*(events_of(engine, seed, bad_luck) for seed in range(IN_FLIGHT)))

    outcomes = asyncio.run(run())
    assert all(finished(events, seed) for seed, events in enumerate(outcomes))
    assert sum(isinstance(event, Restarted) for events in outcomes for event in events) == CONCURRENCY
    assert engine.status().restarts == 1


def test_a_request_that_kills_the_engine_as_it_is_taken_in_fails_alone(engine: Engine) -> None:
    async def run() -> list[list[Event]]:
        texts = ["unreadable" if seed == 2 else "jazz" for seed in range(6)]
        return await asyncio.gather(*(events_of(engine, seed, text) for seed, text in enumerate(texts)))

    outcomes = asyncio.run(run())
    assert [died(events) for events in outcomes] == [seed == 2 for seed in range(6)]


@pytest.mark.parametrize("late", ["jazz", "poison"])
def test_requests_that_arrive_during_a_search_are_served_and_none_fails_for_another(engine: Engine, late: str) -> None:
    async def run() -> list[list[Event]]:
        early = [
            asyncio.create_task(events_of(engine, seed, "poison" if seed == 5 else "jazz")) for seed in range(IN_FLIGHT)
        ]
        while engine.status().restarts < 2:
            await asyncio.sleep(0.005)
        later = []
        for seed in range(IN_FLIGHT, 2 * IN_FLIGHT):
            text = late if seed == IN_FLIGHT + 3 else "jazz"
            later.append(asyncio.create_task(events_of(engine, seed, text)))
            await asyncio.sleep(0.01)
        return await asyncio.gather(*early, *later)

    outcomes = asyncio.run(run())
    poisons = [5] if late == "jazz" else [5, IN_FLIGHT + 3]
    assert [seed for seed, events in enumerate(outcomes) if died(events)] == poisons
    assert all(finished(events, seed) for seed, events in enumerate(outcomes) if seed not in poisons)


def test_a_suspect_that_is_cancelled_does_not_hold_up_the_others(engine: Engine) -> None:
    async def run() -> list[list[Event]]:
        tasks = [
            asyncio.create_task(events_of(engine, seed, "poison" if seed == 0 else "jazz")) for seed in range(IN_FLIGHT)
        ]
        while engine.status().restarts < 2:
            await asyncio.sleep(0.005)
        assert engine.cancel("job 0")
        return await asyncio.gather(*tasks)

    outcomes = asyncio.run(run())
    assert all(finished(events, seed) for seed, events in enumerate(outcomes) if seed)
