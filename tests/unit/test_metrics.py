"""What a worker measures, and that TorchServe takes all of it."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from ts.context import Context
from ts.metrics.metric_cache_yaml_impl import MetricsCacheYamlImpl

from handler.engine.messages import (
    Audio,
    Done,
    EngineBusyError,
    Event,
    Failed,
    Progress,
    Restarted,
    Started,
    Status,
)
from handler.metrics import Kind, Metrics
from handler.torchserve_compat import metric_sink

METRICS_YAML = Path(__file__).parents[2] / "metrics.yaml"
AUDIO, DONE = Audio(np.zeros((1, 640), np.float32)), Done(np.zeros((4, 1), np.int64))
IDLE = Status(waiting=0, running=0, rows=0, steps_per_second=0.0, restarts=0)


class Measurement(NamedTuple):
    name: str
    kind: Kind
    value: float
    labels: list[str]


class Measurements(list[Measurement]):
    """A sink that keeps everything."""

    def __call__(self, name: str, kind: Kind, value: float, labels: list[str]) -> None:
        self.append(Measurement(name, kind, value, labels))

    def of(self, name: str) -> list[float]:
        return [measurement.value for measurement in self if measurement.name == f"musicgen_{name}"]


class Clock:
    """One that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr("handler.metrics.time.monotonic", lambda: self.now)


def timed(metrics: Metrics, clock: Clock, *events: tuple[float, Event]) -> list[Event]:
    """The events that come out when these go in, each so many seconds after the one before."""

    async def source() -> AsyncIterator[Event]:
        for seconds, event in events:
            clock.now += seconds
            yield event

    async def run() -> list[Event]:
        return [event async for event in metrics.timed(source(), 8.0)]

    return asyncio.run(run())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def metrics_and_measured() -> tuple[Metrics, Measurements]:
    measured = Measurements()
    return Metrics(measured, "small", "17"), measured


def test_answers_are_counted_by_outcome() -> None:
    metrics, measured = metrics_and_measured()
    for outcome in ("ok", "busy", "ok"):
        metrics.request(outcome)
    assert measured == [
        ("musicgen_requests_total", "counter", 1, ["small", "17", outcome]) for outcome in ("ok", "busy", "ok")
    ]


def test_a_clip_s_wait_first_audio_and_speed_are_measured(clock: Clock) -> None:
    metrics, measured = metrics_and_measured()
    events: list[tuple[float, Event]] = [
        (2.0, Started()),
        (0.5, Progress(1, 9)),
        (0.5, AUDIO),
        (1.0, AUDIO),
        (2.0, DONE),
    ]  # seconds after the one before
    assert timed(metrics, clock, *events) == [event for _, event in events]
    assert measured.of("queue_wait_seconds") == [2.0]
    assert measured.of("first_audio_seconds") == [3.0]
    assert measured.of("real_time_factor") == [8.0 / 4.0]
    assert measured.of("audio_seconds_total") == [8.0]
    assert all(measurement.labels == ["small", "17"] for measurement in measured)


def test_a_clip_that_is_begun_anew_has_waited_once(clock: Clock) -> None:
    metrics, measured = metrics_and_measured()
    timed(metrics, clock, (1.0, Started()), (1.0, Restarted()), (1.0, Started()), (1.0, AUDIO), (0.0, DONE))
    assert (measured.of("queue_wait_seconds"), measured.of("first_audio_seconds")) == ([1.0], [4.0])


def test_a_clip_that_is_not_finished_makes_no_audio(clock: Clock) -> None:
    metrics, measured = metrics_and_measured()
    timed(metrics, clock, (1.0, Failed(EngineBusyError("64 requests are waiting already", 3))))
    assert measured == []
    timed(metrics, clock, (1.0, Started()), (1.0, AUDIO), (1.0, Failed(RuntimeError("x"))))
    assert (measured.of("audio_seconds_total"), measured.of("real_time_factor")) == ([], [])


def test_the_engine_s_status_is_told_and_each_restart_counted_once() -> None:
    metrics, measured = metrics_and_measured()
    metrics.status(Status(waiting=3, running=2, rows=4, steps_per_second=51.5, restarts=1))
    assert [measured.of(name) for name in ("queue_depth", "running_requests", "active_rows", "steps_per_second")] == [
        [3],
        [2],
        [4],
        [51.5],
    ]
    metrics.status(replace(IDLE, restarts=1))
    metrics.status(replace(IDLE, restarts=4))
    assert measured.of("engine_restarts_total") == [1, 3]


def test_a_watched_status_is_told_when_it_has_changed() -> None:
    metrics, measured = metrics_and_measured()
    busy = replace(IDLE, running=1)
    statuses = iter([IDLE, IDLE, busy, busy, busy, IDLE])
    ended = threading.Event()

    def status() -> Status:
        try:
            return next(statuses)
        except StopIteration:
            ended.set()
            threading.Event().wait()  # a watch ends with its worker
            raise

    metrics.watch(status, seconds=0.001)
    assert ended.wait(10)
    assert measured.of("running_requests") == [0, 1, 0]


def measured_everything(sink: Measurements | None, context: Context | None = None) -> None:
    """Reports each of a worker's metrics at least once."""
    metrics = Metrics(sink if sink is not None else metric_sink(context), "small", "17")
    metrics.request("ok")
    with metrics.in_flight():
        pass

    async def source() -> AsyncIterator[Event]:
        for event in (Started(), AUDIO, DONE):
            yield event

    async def run() -> None:
        async for _ in metrics.timed(source(), 8.0):
            pass

    asyncio.run(run())
    metrics.status(replace(IDLE, restarts=1))


def context_with(metrics_yaml: Path) -> Context:
    cache = MetricsCacheYamlImpl(str(metrics_yaml))
    cache.initialize_cache()
    return Context("small", "/models/small", None, 1, None, "0.12.0", metrics=cache)


def test_every_metric_is_declared_with_its_type_and_labels() -> None:
    measured = Measurements()
    measured_everything(measured)
    declared = {
        (name, kind.value): len(metric.dimension_names)
        for kind, metrics in context_with(METRICS_YAML).metrics.cache.items()
        for name, metric in metrics.items()
        if name.startswith("musicgen_")
    }
    assert {(each.name, each.kind): len(each.labels) for each in measured} == declared


def test_torchserve_logs_every_metric_as_its_frontend_reads_it(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    measured = Measurements()
    measured_everything(measured)
    measured_everything(None, context_with(METRICS_YAML))
    lines = [record.getMessage() for record in caplog.records if "[METRICS]" in record.getMessage()]
    assert len(lines) == len(measured)
    for line, (name, kind, _, _) in zip(lines, measured, strict=True):
        assert line.startswith(f"[METRICS]{name}.")
        assert "|#ModelName:small,Worker:17" in line
        assert f"|#type:{kind.upper()}|" in line
    assert lines[0].startswith("[METRICS]musicgen_requests_total.Count:1|#ModelName:small,Worker:17,Outcome:ok|")


def test_what_the_server_does_not_declare_is_dropped_and_each_name_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = tmp_path / "metrics.yaml"
    other.write_text("model_metrics: {counter: [{name: other, unit: Count, dimensions: [ModelName]}]}")
    caplog.set_level(logging.INFO)
    measured_everything(None, context_with(other))
    warnings = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert all("metrics_config" in warning for warning in warnings)
    names = [warning.split()[0] for warning in warnings]
    assert len(names) == len(set(names)) >= 9
    assert not any("[METRICS]" in record.getMessage() for record in caplog.records)
