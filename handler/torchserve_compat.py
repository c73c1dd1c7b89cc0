"""TorchServe 0.12.0's ways and the way round each of them; with the entry, the only module that knows TorchServe.

With `asyncCommunication: true` the frontend keeps every request of a worker in one table and reads all replies from
one socket. What follows from that, and what is done here:

* two threads of the worker write to that socket, unlocked, and large messages interleave: `lock_worker_socket`;
* a request leaves the table only by a reply whose last message says `ts_stream_next: "false"`, so every reply is
  sent as a stream, and every message of it from here;
* the body of a streamed reply with an error status is lost, so an error is one complete message, followed at once
  by the empty one that closes the table's entry;
* the worker sends what `handle` returns as one message more: it is `SENT`, which the socket drops;
* a message longer than `max_response_size` ends the connection: bodies go in pieces of `CHUNK_BYTES`;
* over gRPC, and for a model's description, a second message to a finished call is an error in the frontend that ends
  the worker's connection for good: those replies are one message, which closes the table's entry as well. The worker
  cannot tell Predictions from StreamPredictions, so this holds for both;
* a batch of two or more is an error in the frontend, after which those requests are never answered: a worker that is
  told of a batch size above 1 has TorchServe stop it (`require_frontend`);
* whatever `handle` raises is sent to every request of the worker: `handle` may raise nothing at all;
* a measurement that the server's metrics file does not declare is dropped: `metric_sink` says so once.
"""

from __future__ import annotations

import asyncio
import http.client
import logging
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any

from ts.context import Context
from ts.metrics.metric_cache_errors import MetricsCacheKeyError
from ts.metrics.metric_type_enum import MetricTypes
from ts.protocol.otf_message_handler import create_predict_response
from ts.service import Service

from handler.errors import RequestError
from handler.metrics import Kind, Sink
from handler.reply import Reply
from handler.request_parser import CLIENT_ID, is_form
from handler.streaming import StreamedReply

logger = logging.getLogger(__name__)

CHUNK_BYTES = 2**20
MAX_GRPC_BYTES = 4 * 2**20 - 1024
"""A gRPC client refuses longer messages unless it is set up to take them; less what the message adds to the body."""
NO_STREAM_OVER_GRPC = "is not served over gRPC; leave it out for the whole clip, or ask over HTTP"
SENT = secrets.token_bytes(32)
"""What `handle` returns when its reply has gone out; random, so that no reply can end in it by chance."""

_END_OF_PREDICTIONS = b"\xff\xff\xff\xff"


class FrontendError(Exception):
    """TorchServe runs this model in a way in which it would lose requests; the message says what to change."""


def require_frontend(context: Context) -> None:
    """Check how TorchServe runs this model.

    Raises:
        FrontendError: for a batch size above 1 (`batch_size` of a registration wins over the archive), or without
            asyncCommunication.
    """
    batch_size = context.system_properties["batch_size"]
    if batch_size is not None and batch_size > 1:
        raise FrontendError(
            f"the batch size is {batch_size}, and TorchServe never answers requests that it puts into one batch; "
            "unregister the model and register it with batch_size=1, or without that parameter and with `batchSize: 1` "
            "in model-config.yaml. Requests run together whatever the batch size is (`max_concurrency`)"
        )
    config = context.model_yaml_config or {}
    if config.get("asyncCommunication") is not True or config.get("continuousBatching"):
        raise FrontendError(
            "model-config.yaml needs `asyncCommunication: true` and no `continuousBatching`; without them TorchServe "
            "cannot run requests together. Set them, and register the model again"
        )


class LockedSocket:
    """The worker's socket; a message is written whole before the next begins."""

    def __init__(self, wrapped: socket.socket) -> None:
        self._wrapped = wrapped
        self._lock = threading.Lock()

    def sendall(self, message: bytes | bytearray) -> None:
        if message.endswith(SENT + _END_OF_PREDICTIONS):
            return
        with self._lock:
            self._wrapped.sendall(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._wrapped, name)


def let_go(row: dict[str, Any]) -> None:
    """Empties what a request brought, in place: TorchServe holds it until the reply has gone out."""
    for value in row.values():
        if isinstance(value, dict | bytearray):
            value.clear()
    row.clear()


def lock_worker_socket() -> None:
    """Have the worker of this process use a LockedSocket; to be called while it loads the model."""
    set_cl_socket = Service.set_cl_socket

    def set_locked_socket(service: Service, wrapped: socket.socket) -> None:
        set_cl_socket(service, LockedSocket(wrapped))

    Service.set_cl_socket = set_locked_socket


class Exchange:
    """One request's identity, and the way of its reply.

    Attributes:
        headers: the request's, by lower-case name. A form's fields are listed among them with a dict for a value;
            those are left out. `url_path` is TorchServe's own.
        request_id: the client's own `x-request-id` if it gave a plain one, else the frontend's.
        is_model_description: asked with `GET /models/<name>?customized=true`.
        has_begun: something of the reply has been sent, so its status can no longer be changed.

    Args:
        row: the request's fields; a prediction has some, or is an empty form.
        context: TorchServe's context of this request.
    """

    def __init__(self, row: Mapping[str, Any], context: Context) -> None:
        self._context = context
        every_header = context.get_all_request_header(0)
        self.headers = {name.lower(): value for name, value in every_header.items() if isinstance(value, str)}
        # TorchServe sets both for addresses under /predictions. Elsewhere a `url_path` is the client's own.
        self.headers.pop("url_path", None)
        path = every_header.get("url_path")
        if isinstance(path, str) and isinstance(every_header.get("explain"), str):
            self.headers["url_path"] = path
        given = self.headers.get("x-request-id", "")
        self.request_id = given if CLIENT_ID.fullmatch(given) else str(context.get_request_id(0))
        # a client of /predictions can send this header too
        self.is_model_description = "describe" in self.headers and not row and not is_form(self.headers)
        # a request over HTTP has a header or two
        self._is_grpc = not self.headers
        self.has_begun = False

    def require_streams(self) -> None:
        """Raises RequestError where a reply cannot be streamed: over gRPC."""
        if self._is_grpc:
            raise RequestError("stream", NO_STREAM_OVER_GRPC)

    def require_room(self, size: int) -> None:
        """Raises RequestError where the client cannot receive a body of so many bytes: over gRPC."""
        if self._is_grpc and size > MAX_GRPC_BYTES:
            raise RequestError(
                "duration",
                f"the reply would take up to {size / 2**20:.1f} MiB, and gRPC clients accept 4 MiB; ask for mp3 or "
                "ogg, for a shorter clip, or over HTTP",
            )

    async def send(self, reply: Reply) -> None:
        """Send the whole reply; `handle` has to return `[SENT]` then."""
        self._set_head(reply.status, reply.content_type, reply.headers)
        for messages in self._messages(reply):
            await self._put(messages)

    async def send_stream(self, reply: StreamedReply) -> None:
        """Send a reply while its body comes; its end too if the body breaks off after some of it has gone out.

        Raises:
            Exception: what broke the body off.
        """
        self._set_head(200, reply.content_type, reply.headers)
        try:
            async for piece in reply.body:
                for message in self._pieces(piece):
                    await self._put(message)
        except BaseException:
            if self.has_begun:
                await self._put(self._last(b""))
            raise
        await self._put(self._last(b""))

    def _set_head(self, status: int, content_type: str, headers: Mapping[str, str]) -> None:
        self._context.set_response_status(status, _phrase(status), 0)
        self._context.set_response_content_type(0, content_type)
        for name, value in headers.items():
            self._context.set_response_header(0, name, value)

    async def _put(self, messages: bytearray) -> None:
        self.has_begun = True
        await asyncio.to_thread(self._context.cl_socket.sendall, messages)

    def _messages(self, reply: Reply) -> Iterator[bytearray]:
        """The messages of a reply; those that must not be parted come together."""
        if self.is_model_description or self._is_grpc:
            yield self._last(reply.body)
        elif reply.status >= 400:
            yield self._message(reply.body) + self._last(b"")
        else:
            yield from self._pieces(reply.body)
            yield self._last(b"")

    def _pieces(self, body: bytes) -> Iterator[bytearray]:
        for start in range(0, len(body), CHUNK_BYTES):
            yield self._message(body[start : start + CHUNK_BYTES], more=True)

    def _message(self, body: bytes, more: bool = False) -> bytearray:
        # 200 here is the exchange with the worker; the client's status is in the context
        return create_predict_response([body], self._context.request_ids, "", 200, self._context, more)

    def _last(self, body: bytes) -> bytearray:
        self._context.set_response_header(0, "ts_stream_next", "true")  # which the encoder turns into "false"
        return self._message(body)


def metric_sink(context: Context) -> Sink:
    """Where a worker's measurements go: to TorchServe's log of metrics, which its frontend reads."""
    kinds = {"counter": MetricTypes.COUNTER, "gauge": MetricTypes.GAUGE, "histogram": MetricTypes.HISTOGRAM}
    undeclared: set[str] = set()

    def sink(name: str, kind: Kind, value: float, labels: list[str]) -> None:
        try:
            context.metrics.get_metric(name, kinds[kind]).add_or_update(value, labels)
        except MetricsCacheKeyError:
            if name not in undeclared:
                logger.warning("%s is dropped: set `metrics_config` to this project's metrics.yaml", name)
            undeclared.add(name)

    return sink


def _phrase(status: int) -> str:
    return http.client.responses.get(status, "")
