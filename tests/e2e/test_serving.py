"""Many requests at once, restarts, and the secure defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import requests

from tests.e2e.conftest import Server, run_server

TIMEOUT = 120


def test_twenty_requests_at_once_each_get_their_own_clip(server: Server) -> None:
    bodies: list[dict[str, Any]] = [
        {"prompt": f"song {number}", "duration": 0.2 + 0.1 * (number % 5), "seed": number} for number in range(20)
    ]
    together = server.post_together(*bodies)
    assert [response.status_code for response in together] == [200] * 20
    assert [response.headers["x-seed"] for response in together] == [str(body["seed"]) for body in bodies]
    for body, response in zip(bodies[::7], together[::7], strict=True):
        assert server.post(**body).content == response.content


def test_errors_disturb_no_other_request(server: Server) -> None:
    good: dict[str, Any] = {"prompt": "80s pop", "duration": 4, "seed": 1}
    alone = server.post(**good)
    bad: list[dict[str, Any]] = [{"duration": -1}, {"nonsense": 1}, {"cfg_coef": "x"}, {"continuation": "AAAA"}] * 3
    first, *refused, last = server.post_together(good, *bad, good)
    assert [response.status_code for response in refused] == [400] * 12
    assert first.content == last.content == alone.content


def test_a_request_is_given_up_at_its_timeout_and_the_engine_is_free_again(server: Server) -> None:
    late, beside = server.post_together({"duration": 120, "timeout": 0.3}, {"duration": 0.2, "seed": 1})
    assert late.status_code == 504
    assert late.json()["error"]["type"] == "deadline_exceeded"
    assert beside.status_code == 200
    assert server.post(duration=0.2, seed=1).content == beside.content


def test_a_connection_serves_good_and_bad_requests_in_turn(server: Server) -> None:
    with requests.Session() as session:
        for number in range(10):
            assert session.post(server.url(), json={"duration": -1}, timeout=TIMEOUT).status_code == 400
            reply = session.post(server.url(), json={"duration": 0.1, "seed": number}, timeout=TIMEOUT)
            assert reply.headers["x-seed"] == str(number)


def test_a_restarted_server_gives_the_same_bytes_and_asks_for_a_token(server: Server, archives: list[Path]) -> None:
    fields: dict[str, Any] = {"prompt": "80s pop", "duration": 1, "seed": 5, "format": "ogg"}
    before = server.post(**fields)
    for restarted in run_server(archives[:1], open_profile=False):
        refused = requests.post(restarted.url(), json=fields, timeout=TIMEOUT)
        assert refused.status_code >= 400
        token = restarted.torchserve.authorization("inference")
        after = requests.post(restarted.url(), json=fields, headers=token, timeout=TIMEOUT)
        assert after.content == before.content
        register = requests.post(f"{restarted.management}/models?url=tiny.mar", headers=token, timeout=TIMEOUT)
        assert register.status_code == 400
