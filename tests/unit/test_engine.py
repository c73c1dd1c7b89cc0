from __future__ import annotations

import asyncio
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from handler.engine.engine import Engine
from handler.engine.messages import (
    Card,
    DeadlineExceededError,
    EngineBusyError,
    EngineClosedError,
    Event,
    Failed,
    Finished,
    Job,
    JobCancelledError,
    Progress,
)
from handler.errors import RequestError
from handler.params import Clip, GenerationParams

Gate = threading.Event


class FakeModel:
    """Makes a clip of ones in three steps; a description that names a gate waits there before every step."""

    sample_rate, frame_rate, audio_channels, max_duration = 32_000, 50.0, 1, 30.0
    conditioners = ("description",)
    conditioning = SimpleNamespace(texts={}, wavs={})
    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self) -> None:
        self.gates: dict[str | None, Gate] = {}
        self.served: list[str | None] = []
        self.begun = threading.Semaphore(0)

    def generate_clip(
        self, clip: Clip, params: GenerationParams, callback: Callable[[int, int], None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.served.append(clip.description)
        self.begun.release()
        if clip.description == "broken":
            raise RuntimeError("CUDA error")
        if clip.description == "impossible":
            raise RequestError("duration", "makes no sense")
        for step in range(3):
            if clip.description in self.gates:
                self.gates[clip.description].wait(30)
            callback(step + 1, 3)
        return torch.ones(1, 640), torch.zeros(4, 1, dtype=torch.long)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


@pytest.fixture
def engine(model: FakeModel) -> Iterator[Engine]:
    engine = started(model)
    yield engine
    for gate in model.gates.values():
        gate.set()
    engine.close()


def started(model: FakeModel, max_queue: int = 2) -> Engine:
    load: Any = lambda: model  # noqa: E731
    engine = Engine(load, max_queue=max_queue)
    engine.start()
    return engine


def job(description: str | None = None, seconds: float = 60.0, job_id: str = "") -> Job:
    params = GenerationParams(seed=0)
    return Job(job_id or str(description), Clip(description), params, deadline=time.monotonic() + seconds)


async def outcome(engine: Engine, given: Job) -> Event:
    events = [event async for event in engine.generate(given)]
    assert all(isinstance(event, Progress) for event in events[:-1])
    return events[-1]


async def error(engine: Engine, given: Job) -> Exception:
    last = await outcome(engine, given)
    assert isinstance(last, Failed)
    return last.error


async def begin(model: FakeModel) -> None:
    """Wait until a further job has begun to run."""
    assert await asyncio.to_thread(model.begun.acquire, timeout=30)


async def settle() -> None:
    """Let every task reach its next wait."""
    for _ in range(10):
        await asyncio.sleep(0)


def test_a_job_gives_its_progress_and_then_its_clip(engine: Engine) -> None:
    async def run() -> list[Event]:
        return [event async for event in engine.generate(job())]

    *progress, last = asyncio.run(run())
    assert progress == [Progress(1, 3), Progress(2, 3), Progress(3, 3)]
    assert isinstance(last, Finished)
    assert last.wav.shape == (1, 640)
    assert (last.sample_rate, last.frame_rate, last.codes.shape) == (32_000, 50.0, (4, 1))


def test_the_card_tells_what_is_loaded(engine: Engine) -> None:
    assert engine.describe() == Card(32_000, 1, 50.0, 30.0, ("description",), "cpu", "float32")


def test_jobs_are_served_in_the_order_they_came(model: FakeModel, engine: Engine) -> None:
    async def run() -> None:
        model.gates["first"] = Gate()
        tasks = [asyncio.create_task(outcome(engine, job("first")))]
        await begin(model)
        for name in ("second", "third"):
            tasks.append(asyncio.create_task(outcome(engine, job(name))))
            await settle()
        model.gates["first"].set()
        assert all(isinstance(last, Finished) for last in await asyncio.gather(*tasks))

    asyncio.run(run())
    assert model.served == ["first", "second", "third"]


def test_a_full_queue_refuses_at_once_and_says_when_to_come_back(model: FakeModel, engine: Engine) -> None:
    async def run() -> None:
        model.gates["slow"] = Gate()
        running = asyncio.create_task(outcome(engine, job("slow")))
        await begin(model)
        waiting = [asyncio.create_task(outcome(engine, job(name))) for name in ("a", "b")]
        await settle()
        refused = await error(engine, job("c"))
        assert isinstance(refused, EngineBusyError)
        assert refused.retry_after >= 1
        model.gates["slow"].set()
        assert all(isinstance(last, Finished) for last in await asyncio.gather(running, *waiting))
        assert isinstance(await outcome(engine, job("c")), Finished)

    asyncio.run(run())


def test_an_idle_engine_without_a_queue_serves(model: FakeModel) -> None:
    engine = started(model, max_queue=0)
    assert isinstance(asyncio.run(outcome(engine, job())), Finished)
    engine.close()


def test_a_waiting_job_is_given_up_at_its_deadline_and_frees_its_place(model: FakeModel, engine: Engine) -> None:
    async def run() -> None:
        model.gates["slow"] = Gate()
        running = asyncio.create_task(outcome(engine, job("slow")))
        await begin(model)
        for _ in range(5):
            assert isinstance(await error(engine, job("late", seconds=0.01)), DeadlineExceededError)
        model.gates["slow"].set()
        assert isinstance(await running, Finished)

    asyncio.run(run())
    assert model.served == ["slow"]


def test_a_running_job_ends_at_its_deadline_and_the_next_is_served(model: FakeModel, engine: Engine) -> None:
    async def run() -> None:
        model.gates["slow"] = Gate()
        assert isinstance(await error(engine, job("slow", seconds=0.05)), DeadlineExceededError)
        model.gates["slow"].set()
        assert isinstance(await outcome(engine, job("next")), Finished)

    asyncio.run(run())


@pytest.mark.parametrize("chosen", ["running", "waiting"])
def test_a_cancelled_job_fails_and_the_others_do_not(model: FakeModel, engine: Engine, chosen: str) -> None:
    async def run() -> None:
        model.gates["running"] = Gate()
        tasks = {"running": asyncio.create_task(outcome(engine, job("running")))}
        await begin(model)
        tasks["waiting"] = asyncio.create_task(outcome(engine, job("waiting")))
        await settle()
        assert engine.cancel(chosen)
        cancelled = await tasks.pop(chosen)
        assert isinstance(cancelled, Failed)
        assert isinstance(cancelled.error, JobCancelledError)
        model.gates["running"].set()
        [other] = await asyncio.gather(*tasks.values())
        assert isinstance(other, Finished)
        assert not engine.cancel(chosen)

    asyncio.run(run())


def test_leaving_the_events_early_stops_the_generation(model: FakeModel, engine: Engine) -> None:
    async def run() -> None:
        model.gates["left"] = Gate()
        events = engine.generate(job("left"))
        task = asyncio.ensure_future(anext(events))
        await begin(model)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        model.gates["left"].set()
        assert isinstance(await outcome(engine, job("next")), Finished)

    asyncio.run(run())


def test_what_the_model_raises_fails_that_job_alone(engine: Engine) -> None:
    async def run() -> None:
        assert isinstance(await error(engine, job("broken")), RuntimeError)
        refused = await error(engine, job("impossible"))
        assert isinstance(refused, RequestError)
        assert refused.field == "duration"
        assert isinstance(await outcome(engine, job()), Finished)

    asyncio.run(run())


def test_a_model_that_cannot_be_loaded_is_the_error_of_start() -> None:
    def load() -> Any:
        raise OSError("no such folder")

    with pytest.raises(OSError, match="no such folder"):
        Engine(load).start()


def test_closing_fails_what_is_running_and_waiting(model: FakeModel, engine: Engine) -> None:
    async def run() -> None:
        model.gates["slow"] = Gate()
        tasks = [asyncio.create_task(error(engine, job("slow")))]
        await begin(model)
        tasks.append(asyncio.create_task(error(engine, job("waiting"))))
        await settle()
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        assert all(isinstance(failure, EngineClosedError) for failure in await asyncio.gather(*tasks))
        model.gates["slow"].set()
        await closing
        assert isinstance(await error(engine, job()), EngineClosedError)

    asyncio.run(run())
    engine.close()


def test_an_engine_that_was_not_started_serves_nothing() -> None:
    load: Any = FakeModel
    engine = Engine(load)
    assert isinstance(asyncio.run(error(engine, job())), EngineClosedError)
    with pytest.raises(EngineClosedError):
        engine.describe()
    engine.close()


@pytest.mark.parametrize(
    "message",
    [
        job("rock"),
        Progress(1, 2),
        Card(32_000, 1, 50.0, 30.0, ("description",), "cpu", "float32"),
        *map(
            Failed, (EngineBusyError(64, 3), EngineClosedError("x"), DeadlineExceededError("x"), JobCancelledError("x"))
        ),
        Failed(RequestError("seed", "is missing")),
    ],
)
def test_every_message_survives_pickling(message: Any) -> None:
    copy = pickle.loads(pickle.dumps(message))
    assert repr(copy) == repr(message)
    if isinstance(message, Failed):
        assert vars(copy.error) == vars(message.error)


def test_a_finished_clip_survives_pickling() -> None:
    clip = Finished(torch.rand(1, 640), 32_000, 50.0, torch.zeros(4, 1, dtype=torch.long))
    copy = pickle.loads(pickle.dumps(clip))
    assert torch.equal(copy.wav, clip.wav)
    assert torch.equal(copy.codes, clip.codes)
