"""What Prometheus is told."""

from __future__ import annotations

from typing import Any

from tests.e2e.conftest import Server, eventually

ENDLESS: dict[str, Any] = {"prompt": "80s pop", "duration": 120, "seed": 1}


def test_requests_are_counted_by_their_outcome(server: Server) -> None:
    outcomes = {"ok": 3, "invalid_request": 2, "deadline_exceeded": 1}

    def counts() -> dict[str, float]:
        name = "musicgen_requests_total"
        return {outcome: sum(server.measured(name, Outcome=outcome).values()) for outcome in outcomes}

    before = counts()
    good: list[dict[str, Any]] = [{}, {"stream": True}, {"stream_format": "sse"}]
    bad: list[dict[str, Any]] = [{"duration": -1}, {"nonsense": 1}, {**ENDLESS, "timeout": 0.3}]
    assert [server.post(duration=0.2, **body).status_code for body in good] == [200] * 3
    assert [server.post(**body).status_code for body in bad] == [400, 400, 504]
    eventually(lambda: counts() == {outcome: before[outcome] + more for outcome, more in outcomes.items()})


def test_every_clip_adds_its_seconds_and_its_times(server: Server) -> None:
    histograms = ("musicgen_queue_wait_seconds", "musicgen_first_audio_seconds", "musicgen_real_time_factor")
    names = ["musicgen_audio_seconds_total", *(f"{name}_count" for name in histograms)]

    def totals() -> list[float]:
        return [sum(server.measured(name).values()) for name in names]

    before = totals()
    for stream in (True, False):
        assert server.post(duration=1.5, seed=1, stream=stream).status_code == 200
    eventually(lambda: totals() == [before[0] + 3.0, *(count + 2 for count in before[1:])])
    for name in histograms:
        buckets = server.measured(f"{name}_bucket", le="+Inf")
        assert buckets == server.measured(f"{name}_count")
        assert all(value > 0 for value in server.measured(f"{name}_sum").values())


def test_the_gauges_follow_what_runs_and_what_waits(server: Server) -> None:
    [worker] = server.workers("narrow")

    def gauges() -> list[float]:
        names = ("queue_depth", "running_requests", "active_rows")
        return [server.measured(f"musicgen_{name}", "narrow").get(str(worker.pid), 0.0) for name in names]

    def steps_per_second() -> float:
        return server.measured("musicgen_steps_per_second", "narrow").get(str(worker.pid), 0.0)

    streams = [server.stream("narrow", "running", **ENDLESS) for _ in range(2)]
    eventually(lambda: gauges() == [0, 2, 4] and steps_per_second() > 0)
    server.cancel("running", "narrow")
    for stream in streams:
        assert stream.content
    eventually(lambda: [*gauges(), steps_per_second()] == [0, 0, 0, 0])


def test_restarts_of_the_engine_and_torchserve_s_own_counts_are_there(server: Server) -> None:
    server.post(duration=0.1)
    report = server.report()
    assert "# TYPE musicgen_engine_restarts_total counter" in report
    assert 'ts_inference_requests_total{model_name="tiny"' in report
