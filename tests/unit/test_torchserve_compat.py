"""The messages a worker sends, byte for byte as TorchServe's frontend reads them."""

from __future__ import annotations

import asyncio
import struct
import threading
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
from ts.context import Context, RequestProcessor
from ts.protocol.otf_message_handler import create_predict_response
from ts.service import Service

from handler import torchserve_compat
from handler.errors import RequestError
from handler.reply import Reply
from handler.streaming import StreamedReply
from handler.torchserve_compat import CHUNK_BYTES, MAX_GRPC_BYTES, SENT, Exchange, LockedSocket


class FakeSocket:
    """Writes a message in two parts, so that an unlocked writer would get in between."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.timeout = 30

    def sendall(self, message: bytes | bytearray) -> None:
        half = len(message) // 2
        self.data += message[:half]
        threading.Event().wait(0.001)
        self.data += message[half:]


@dataclass
class Message:
    code: int
    request_id: str
    status: int
    phrase: str
    headers: dict[str, str]
    body: bytes


def messages_in(data: bytes | bytearray) -> list[Message]:
    messages = []
    at = 0

    def number() -> int:
        nonlocal at
        at += 4
        return int(struct.unpack("!i", data[at - 4 : at])[0])

    def text() -> str:
        nonlocal at
        length = number()
        at += length
        return bytes(data[at - length : at]).decode()

    while at < len(data):
        code, _ = number(), text()
        request_id, content_type, status, phrase = text(), text(), number(), text()
        headers = {text(): text() for _ in range(number())}
        length = number()
        body = bytes(data[at : at + length])
        at += length
        assert number() == -1
        assert headers.get("content-type", "") == content_type
        messages.append(Message(code, request_id, status, phrase, headers, body))
    return messages


def context_of(headers: Mapping[str, Any], socket: LockedSocket | None = None) -> Context:
    context = Context("small", "/models/small", None, 1, None, "0.12.0")
    context.request_ids = {0: "frontend-id"}
    context.request_processor = [RequestProcessor(dict(headers))]
    context.cl_socket = socket
    return context


HTTP = {"Host": "127.0.0.1"}


def sent(reply: Reply, row: Mapping[str, Any], headers: Mapping[str, Any]) -> list[Message]:
    """All the frontend gets for one request: what `send` sends and what the worker adds from what `handle` returns."""
    raw: Any = FakeSocket()
    locked = LockedSocket(raw)
    context = context_of(headers, locked)
    asyncio.run(Exchange(row, context).send(reply))
    locked.sendall(create_predict_response([SENT], context.request_ids, "Prediction success", 200, context))
    return messages_in(raw.data)


ROW = {"body": b"x"}


def test_a_clip_is_a_stream_of_chunks_and_an_end() -> None:
    body = bytes(range(256)) * (CHUNK_BYTES // 256) * 3 + b"rest"
    messages = sent(Reply(200, "audio/wav", body, {"x-seed": "7"}), ROW, HTTP)
    assert b"".join(message.body for message in messages) == body
    assert [message.headers["ts_stream_next"] for message in messages] == ["true"] * 4 + ["false"]
    assert all(len(message.body) <= CHUNK_BYTES for message in messages)
    first = messages[0]
    assert (first.code, first.status, first.phrase, first.request_id) == (200, 200, "OK", "frontend-id")
    assert first.headers["x-seed"] == "7"
    assert first.headers["content-type"] == "audio/wav"


def test_an_error_is_one_whole_message_and_the_end_of_its_stream() -> None:
    whole, end = sent(Reply(503, "application/json", b"{}", {"retry-after": "3"}), ROW, HTTP)
    assert (whole.code, whole.status, whole.phrase, whole.body) == (200, 503, "Service Unavailable", b"{}")
    assert whole.headers == {"content-type": "application/json", "retry-after": "3"}
    assert (end.code, end.body, end.headers["ts_stream_next"]) == (200, b"", "false")


def test_a_status_of_our_own_has_no_phrase() -> None:
    assert sent(Reply(499, "application/json", b"{}"), ROW, HTTP)[0].phrase == ""


def test_a_model_description_is_one_message_that_ends_its_stream() -> None:
    [message] = sent(Reply(200, "application/json", b"{}"), {}, {"describe": "True"})
    assert (message.body, message.headers["ts_stream_next"]) == (b"{}", "false")


@pytest.mark.parametrize("status", [200, 400])
def test_a_reply_over_grpc_is_one_message_that_ends_its_stream(status: int) -> None:
    body = bytes(3 * CHUNK_BYTES)
    [message] = sent(Reply(status, "audio/wav", body), {"prompt": b"x"}, {"prompt": {"content-type": ""}})
    assert (message.body, message.headers["ts_stream_next"]) == (body, "false")


def test_a_reply_too_long_for_a_grpc_client_is_refused_and_over_http_none_is() -> None:
    Exchange(ROW, context_of(HTTP)).require_room(2**30)
    exchange = Exchange({"prompt": b"x"}, context_of({"prompt": {"content-type": ""}}))
    exchange.require_room(MAX_GRPC_BYTES)
    with pytest.raises(RequestError, match=r"duration: the reply would take up to 7\.0 MiB, .* accept 4 MiB; .* mp3"):
        exchange.require_room(7 * 2**20)


def streamed(
    pieces: list[bytes | Exception], headers: Mapping[str, Any] = HTTP
) -> tuple[list[Message], list[int], bool, Exception | None]:
    """All the frontend gets, how many messages it had at each piece, whether it has begun, and what was raised."""
    raw: Any = FakeSocket()
    locked = LockedSocket(raw)
    context = context_of(headers, locked)
    exchange = Exchange(ROW, context)
    had = []

    async def body() -> AsyncIterator[bytes]:
        for piece in pieces:
            had.append(len(messages_in(raw.data)))
            if isinstance(piece, Exception):
                raise piece
            yield piece

    raised = None
    try:
        asyncio.run(exchange.send_stream(StreamedReply("audio/mpeg", body(), {"x-seed": "7"})))
    except Exception as error:
        raised = error
    locked.sendall(create_predict_response([SENT], context.request_ids, "Prediction success", 200, context))
    return messages_in(raw.data), had, exchange.has_begun, raised


def test_a_stream_is_sent_piece_by_piece_as_it_comes() -> None:
    messages, had, has_begun, raised = streamed([b"first", b"", b"second"])
    assert [message.body for message in messages] == [b"first", b"second", b""]
    assert [message.headers["ts_stream_next"] for message in messages] == ["true", "true", "false"]
    assert (had, has_begun, raised) == ([0, 1, 1], True, None)
    for message in messages:
        assert (message.code, message.status, message.phrase, message.request_id) == (200, 200, "OK", "frontend-id")
        assert (message.headers["content-type"], message.headers["x-seed"]) == ("audio/mpeg", "7")


def test_a_long_piece_of_a_stream_is_cut_into_chunks() -> None:
    piece = bytes(range(256)) * (CHUNK_BYTES // 256) * 2 + b"rest"
    messages, *_ = streamed([piece, b"end"])
    assert [len(message.body) for message in messages] == [CHUNK_BYTES, CHUNK_BYTES, 4, 3, 0]
    assert b"".join(message.body for message in messages) == piece + b"end"


def test_a_stream_that_breaks_off_has_its_end() -> None:
    failure = RuntimeError("the engine died")
    messages, _, has_begun, raised = streamed([b"first", failure])
    assert [message.body for message in messages] == [b"first", b""]
    assert messages[-1].headers["ts_stream_next"] == "false"
    assert has_begun
    assert raised is failure


def test_streams_are_refused_over_grpc_alone() -> None:
    Exchange(ROW, context_of(HTTP)).require_streams()
    with pytest.raises(RequestError, match=r"stream: is not served over gRPC"):
        Exchange(ROW, context_of({"prompt": {"content-type": ""}})).require_streams()


def test_a_reply_has_begun_with_its_first_message() -> None:
    raw: Any = FakeSocket()
    exchange = Exchange(ROW, context_of(HTTP, LockedSocket(raw)))
    assert not exchange.has_begun
    asyncio.run(exchange.send(Reply(200, "audio/wav", b"")))
    assert exchange.has_begun


@pytest.mark.parametrize(
    ("row", "headers"),
    [
        ({"body": b""}, {"describe": "True"}),
        ({"prompt": b"x"}, {"describe": "True", "content-type": "multipart/form-data"}),
        ({}, {"Describe": "True", "Content-Type": "application/x-www-form-urlencoded"}),
        ({"describe": b"True"}, {"describe": {"content-type": ""}}),
    ],
)
def test_a_client_cannot_pass_for_a_model_description(row: dict[str, Any], headers: dict[str, Any]) -> None:
    assert not Exchange(row, context_of(headers)).is_model_description


def test_headers_are_found_whatever_their_case_and_form_fields_are_not_headers() -> None:
    exchange = Exchange(ROW, context_of({"Accept": "audio/mpeg", "seed": {"content-type": "text/plain"}}))
    assert exchange.headers == {"accept": "audio/mpeg"}


@pytest.mark.parametrize(
    ("headers", "path"),
    [
        ({"explain": "False", "url_path": "play/x.mp3"}, "play/x.mp3"),
        ({"explain": "False", "url_path": ""}, ""),
        ({"URL_PATH": "cancel", "explain": "False", "url_path": ""}, ""),
        ({"explain": "False", "url_path": "", "URL_PATH": "cancel"}, ""),
        ({"host": "127.0.0.1", "url_path": "cancel"}, None),
        ({"host": "127.0.0.1", "URL_PATH": "cancel"}, None),
        ({"explain": {"content-type": ""}, "url_path": {"content-type": ""}}, None),
    ],
)
def test_only_torchserve_s_own_path_counts(headers: dict[str, Any], path: str | None) -> None:
    assert Exchange(ROW, context_of(headers)).headers.get("url_path") == path


@pytest.mark.parametrize(
    ("given", "used"),
    [("my-id.1", "my-id.1"), ("a b", "frontend-id"), ("x" * 200, "frontend-id"), ("é", "frontend-id")],
)
def test_the_client_s_own_request_id_is_used_if_it_is_plain(given: str, used: str) -> None:
    assert Exchange(ROW, context_of({"X-Request-Id": given})).request_id == used


def test_messages_from_many_threads_stay_whole() -> None:
    raw: Any = FakeSocket()
    locked = LockedSocket(raw)
    context = context_of({})
    bodies = [bytes([number]) * 5_000 for number in range(20)]
    threads = [
        threading.Thread(
            target=locked.sendall, args=(create_predict_response([body], context.request_ids, "", 200, context),)
        )
        for body in bodies
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(message.body for message in messages_in(raw.data)) == bodies


def test_the_locked_socket_is_otherwise_the_worker_s_own() -> None:
    raw: Any = FakeSocket()
    assert LockedSocket(raw).timeout == 30


def test_the_worker_gets_a_locked_socket(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Service, "set_cl_socket", Service.set_cl_socket)
    torchserve_compat.lock_worker_socket()
    service: Any = SimpleNamespace()
    Service.set_cl_socket(service, FakeSocket())
    assert isinstance(service.cl_socket, LockedSocket)
