"""What one engine promises its many clients: their own bytes, whoever else is there and whatever dies."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import requests

from tests.e2e.conftest import TIMEOUT, Server, eventually
from tests.e2e.mixture import mixture

SHORT: dict[str, Any] = {"prompt": "80s pop", "duration": 0.4, "seed": 1}
LONG: dict[str, Any] = {"prompt": "warm jazz", "duration": 25, "seed": 2}
ENDLESS: dict[str, Any] = {"prompt": "warm jazz", "duration": 120, "seed": 3}
ENDLESS_BYTES = 2 * 32_000 * 120


def error_of(response: requests.Response) -> tuple[int, str]:
    error = response.json()["error"]
    assert error["code"] == response.status_code
    return error["code"], error["type"]


def test_a_short_request_joins_a_long_one_and_leaves_first(server: Server) -> None:
    alone = [server.post(**SHORT).content, server.post(**LONG, stream_format="sse").content]
    with ThreadPoolExecutor() as pool:
        long = server.stream(**LONG, stream_format="sse")
        rest = pool.submit(lambda: long.content)
        short = server.post(**SHORT)
        assert not rest.done()
        assert [short.content, rest.result()] == alone


def test_every_request_of_a_mixture_gets_the_bytes_it_gets_alone(server: Server) -> None:
    bodies = mixture(24, longest=8)
    together = server.post_together(*bodies)
    assert [reply.status_code for reply in together] == [200] * len(bodies)
    for body, reply in zip(bodies, together, strict=True):
        assert server.post(**body).content == reply.content, body


@pytest.mark.faults
def test_nobody_who_waits_for_a_whole_clip_notices_that_the_engine_died(server: Server) -> None:
    bodies = [{"prompt": f"song {number}", "duration": 1 + number % 4, "seed": number} for number in range(12)]
    alone = [server.post(**body).content for body in bodies]
    workers, engine = server.workers(), server.engine()
    restarts = sum(server.measured("musicgen_engine_restarts_total").values())
    log = server.torchserve.folder / "logs" / "server.log"
    logged = len(log.read_text())  # other tests have workers of this server end
    with ThreadPoolExecutor(len(bodies)) as pool:
        stream = server.stream(**ENDLESS, format="pcm")
        replies = [pool.submit(server.post, **body) for body in bodies]
        replies[0].result()  # now the others run or wait
        engine.kill()
        assert [reply.result().content for reply in replies] == alone
    assert 0 < len(stream.content) < ENDLESS_BYTES
    assert server.workers() == workers
    assert server.engine() != engine
    assert "Worker disconnected" not in log.read_text()[logged:]
    eventually(lambda: sum(server.measured("musicgen_engine_restarts_total").values()) == restarts + 1)


@pytest.mark.faults
def test_poisoned_requests_are_errors_and_spoil_no_other(server: Server) -> None:
    good = [{"prompt": "80s pop", "duration": 2, "seed": seed} for seed in range(4)]
    poisoned = [{**SHORT, "prompt": prompt} for prompt in ("raise", "raise late", "die", "die early")]
    alone = [server.post(**body).content for body in good]
    replies = server.post_together(*good, *poisoned, model="fragile")
    assert [error_of(reply) for reply in replies[4:]] == [(500, "internal_error")] * 4
    assert [reply.content for reply in replies[:4]] == alone
    assert server.post("fragile", **good[0]).content == alone[0]


@pytest.mark.faults
def test_a_full_engine_refuses_at_once_and_a_cancel_makes_room_at_once(server: Server) -> None:
    names = ["first", "second", "third"]
    [worker] = server.workers("narrow")
    with ThreadPoolExecutor() as pool:
        replies = [pool.submit(server.post, "narrow", name, **ENDLESS) for name in names]
        eventually(lambda: server.measured("musicgen_queue_depth", "narrow").get(str(worker.pid)) == 1)
        refused = server.post("narrow", **SHORT)
        assert not any(reply.done() for reply in replies)
        assert error_of(refused) == (503, "busy")
        assert int(refused.headers["retry-after"]) >= 1
        for name, reply in zip(names, replies, strict=True):
            server.cancel(name, "narrow")
            assert error_of(reply.result()) == (499, "cancelled")
    assert server.post("narrow", **SHORT).content == server.post(**SHORT).content
    url, headers = server.url("narrow", "/1.0/cancel"), {"x-request-id": "first"}
    assert error_of(requests.post(url, headers=headers, timeout=TIMEOUT)) == (404, "unknown_request")


def test_a_cancelled_stream_breaks_off_and_events_say_so(server: Server) -> None:
    audio = server.stream("tiny", "both", **ENDLESS, format="pcm")
    events = server.stream("tiny", "both", **ENDLESS, stream_format="sse")
    server.cancel("both")
    assert 0 < len(audio.content) < ENDLESS_BYTES
    assert '"type": "cancelled"' in events.text.splitlines()[-2]


def test_a_request_is_given_up_at_its_timeout_while_it_waits_as_well(server: Server) -> None:
    running = [server.stream("narrow", "running", **ENDLESS) for _ in range(2)]
    assert error_of(server.post("narrow", **SHORT, timeout=0.2)) == (504, "deadline_exceeded")
    server.cancel("running", "narrow")
    for stream in running:
        assert 0 < len(stream.content) < ENDLESS_BYTES
    assert server.post("narrow", **SHORT).status_code == 200


def test_two_workers_share_the_load_and_a_cancel_finds_either(server: Server) -> None:
    server.scale("narrow", 2)
    try:
        before = server.measured("musicgen_requests_total", "narrow", Outcome="ok")
        with ThreadPoolExecutor() as pool:
            replies = list(pool.map(lambda _: server.post("narrow", **SHORT), range(4)))
            for number in range(6):
                long = pool.submit(server.post, "narrow", f"long-{number}", **ENDLESS)
                server.cancel(f"long-{number}", "narrow")
                assert error_of(long.result()) == (499, "cancelled")
        assert {reply.content for reply in replies} == {server.post(**SHORT).content}
        pids = {str(worker.pid) for worker in server.workers("narrow")}
        assert len(pids) == 2

        def have_served() -> set[str]:
            after = server.measured("musicgen_requests_total", "narrow", Outcome="ok")
            return {worker for worker in after if after[worker] > before.get(worker, 0)}

        eventually(lambda: have_served() == pids)
    finally:
        server.scale("narrow", 1)
    assert server.post("narrow", **SHORT).content == replies[0].content


@pytest.mark.load
def test_sixteen_requests_in_flight_at_a_crash_are_retried_together(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    bodies = [{"prompt": f"song {number}", "duration": 8, "seed": number} for number in range(16)]
    started = time.monotonic()
    alone = [server.post(**body).content for body in bodies]
    one_by_one = time.monotonic() - started
    with ThreadPoolExecutor(len(bodies)) as pool:
        replies = [pool.submit(server.post, **body) for body in bodies]
        [worker] = server.workers()
        eventually(lambda: server.measured("musicgen_running_requests").get(str(worker.pid), 0) >= 8)
        killed = time.monotonic()
        server.engine().kill()
        assert [reply.result().content for reply in replies] == alone
        together = time.monotonic() - killed
    with capsys.disabled():
        print(f"\n16 clips of 8 s: {one_by_one:.1f} s one by one, {together:.1f} s retried together after a crash")


@pytest.mark.load
def test_of_sixteen_requests_the_two_that_crash_the_engine_fail_alone(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    good = [{"prompt": "80s pop", "duration": 2, "seed": seed} for seed in range(14)]
    alone = [server.post(**body).content for body in good]
    bodies = [*good[:5], {**SHORT, "prompt": "die"}, *good[5:12], {**SHORT, "prompt": "die early"}, *good[12:]]
    restarts = sum(server.measured("musicgen_engine_restarts_total", "fragile").values())
    started = time.monotonic()
    replies = server.post_together(*bodies, model="fragile")
    seconds = time.monotonic() - started
    poisoned = [replies.pop(13), replies.pop(5)]
    assert [error_of(reply) for reply in poisoned] == [(500, "internal_error")] * 2
    assert [reply.content for reply in replies] == alone

    def crashes() -> float:
        return sum(server.measured("musicgen_engine_restarts_total", "fragile").values()) - restarts

    eventually(lambda: crashes() > 0)
    with capsys.disabled():
        print(f"\n16 requests of which 2 crash the engine: {seconds:.1f} s, {crashes():.0f} restarts")
