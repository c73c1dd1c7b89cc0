"""As much of a gRPC client as a unary call needs: HTTP/2 (RFC 9113) without TLS, headers uncompressed (RFC 7541)."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

DATA, HEADERS, RESET, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM = ACK = 1
END_HEADERS = 4
LARGEST_WINDOW = 2**31 - 1
TIMEOUT = 120


def predict(port: int, model: str, fields: Mapping[str, str]) -> bytes:
    """What `Predictions` replies to these inputs: a clip, or an error as JSON."""
    reply = call(port, "Predictions", model, fields)
    length, start = _varint(reply, 6)  # behind gRPC's 5 bytes and the tag of PredictionResponse.prediction
    assert len(reply) == start + length
    return reply[start:]


def call(port: int, method: str, model: str, fields: Mapping[str, str]) -> bytes:
    """The bytes that a method of TorchServe's InferenceAPIsService replies with."""
    entries = [_field(3, _field(1, name.encode()) + _field(2, value.encode())) for name, value in fields.items()]
    message = _field(1, model.encode()) + b"".join(entries)
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": f"/org.pytorch.serve.grpc.inference.InferenceAPIsService/{method}",
        ":authority": "localhost",
        "content-type": "application/grpc",
        "te": "trailers",
    }
    block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
            + _frame(SETTINGS, 0, 0, struct.pack("!HI", 4, LARGEST_WINDOW))  # SETTINGS_INITIAL_WINDOW_SIZE
            + _frame(WINDOW_UPDATE, 0, 0, struct.pack("!I", LARGEST_WINDOW - 65_535))
            + _frame(HEADERS, END_HEADERS, 1, block)
            + _frame(DATA, END_STREAM, 1, b"\0" + struct.pack("!I", len(message)) + message)
        )
        stream = connection.makefile("rb")
        reply = b""
        while True:
            length, kind, flags, stream_id = struct.unpack("!IBBI", b"\0" + stream.read(9))
            content = stream.read(length)
            if kind == SETTINGS and not flags & ACK:
                connection.sendall(_frame(SETTINGS, ACK, 0, b""))
            elif kind == PING and not flags & ACK:
                connection.sendall(_frame(PING, ACK, 0, content))
            elif kind == DATA:
                reply += content
            if stream_id == 1 and (kind == RESET or (kind in (DATA, HEADERS) and flags & END_STREAM)):
                return reply


def _frame(kind: int, flags: int, stream: int, content: bytes) -> bytes:
    return struct.pack("!I", len(content))[1:] + struct.pack("!BBI", kind, flags, stream) + content


def _text(text: str) -> bytes:
    """A text of at most 126 bytes, as a header block holds it."""
    return bytes([len(text)]) + text.encode()


def _field(number: int, content: bytes) -> bytes:
    """A field of a protobuf message, of at most 127 bytes."""
    return bytes([number << 3 | 2, len(content)]) + content


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """A protobuf number, and where it ends."""
    value = shift = 0
    while True:
        value |= (data[start] & 0x7F) << shift
        shift, start = shift + 7, start + 1
        if data[start - 1] < 0x80:
            return value, start
