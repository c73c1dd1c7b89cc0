"""What a client gets back: a clip, the model's description, or an error."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from handler.audio import normalize
from handler.audio_encoder import encode
from handler.engine.messages import (
    Card,
    DeadlineExceededError,
    EngineBusyError,
    EngineUnavailableError,
    JobCancelledError,
)
from handler.errors import ModelDivergedError, RequestError, UnknownRequestError
from handler.request import GenerationRequest
from handler.request_parser import MediaTypeError, UnknownPathError

JSON = "application/json"

LOSSY_BYTES_PER_SECOND = 30_000  # 192 kbit/s on average, and a quarter for the peaks of variable bit rates
HEADER_BYTES = 8192  # more than any format's header, and the metadata of a JSON reply


@dataclass(frozen=True, slots=True)
class Reply:
    """A whole HTTP reply."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = field(default_factory=dict)


def clip_reply(request: GenerationRequest, clip: Tensor, sample_rate: int, variant: str) -> Reply:
    """Set the clip's level, encode it, and say in headers what it is.

    The level is set at the model's rate, before any resampling: so a clip has the same gain at every rate.
    """
    wav = normalize(clip, sample_rate, request.normalization)
    audio_format = "wav" if request.format == "json" else request.format
    encoded = encode(wav, sample_rate, audio_format, request.seed, request.sample_rate)
    channels, samples = wav.shape
    about: dict[str, Any] = {
        "seed": request.seed,
        "sample_rate": encoded.sample_rate,
        "channels": channels,
        "duration": samples / sample_rate,
        "variant": variant,
    }
    headers = clip_headers(about)
    if request.format != "json":
        return Reply(200, encoded.content_type, encoded.data, headers)
    about |= {"format": audio_format, "audio": base64.b64encode(encoded.data).decode()}
    return json_reply(about, headers=headers)


def most_bytes(request: GenerationRequest, card: Card) -> int:
    """How many bytes the body of a clip's reply can have at most, known before the clip is made."""
    if request.format not in ("wav", "pcm", "flac", "json"):
        return HEADER_BYTES + math.ceil(request.duration * LOSSY_BYTES_PER_SECOND)
    sample_rate = request.sample_rate or card.sample_rate
    size = HEADER_BYTES + math.ceil(request.duration * sample_rate) * card.channels * 2
    match request.format:
        case "flac":
            return math.ceil(size * 1.01)  # of noise, which cannot be compressed
        case "json":
            return math.ceil(size * 4 / 3)  # base64
    return size


def clip_headers(about: Mapping[str, Any]) -> dict[str, str]:
    """What a clip is, as headers: `sample_rate` is `x-sample-rate`, and so on."""
    return {f"x-{name.replace('_', '-')}": _header_value(value) for name, value in about.items()}


def json_reply(content: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Reply:
    return Reply(status, JSON, json.dumps(content, indent=2).encode() + b"\n", headers or {})


def error_reply(error: BaseException, request_id: str) -> Reply:
    """A reply that tells of an error: its status, and `error_content`."""
    content = error_content(error, request_id)
    headers = {}
    if isinstance(error, EngineBusyError | EngineUnavailableError):
        headers["retry-after"] = str(error.retry_after)
    return json_reply(content, content["error"]["code"], headers)


def error_content(error: BaseException, request_id: str) -> dict[str, Any]:
    """`{"error": {"code", "type", "message", "field"}}`; what is not the client's concern stays in the log."""
    match error:
        case UnknownPathError():
            status, kind = 404, "not_found"
        case UnknownRequestError():
            status, kind = 404, "unknown_request"
        case MediaTypeError():
            status, kind = 415, "unsupported_media_type"
        case RequestError():
            status, kind = 400, "invalid_request"
        case EngineBusyError():
            status, kind = 503, "busy"
        case EngineUnavailableError():
            status, kind = 503, "unavailable"
        case DeadlineExceededError():
            status, kind = 504, "deadline_exceeded"
        case JobCancelledError():
            status, kind = 499, "cancelled"
        case ModelDivergedError():
            status, kind = 500, "model_diverged"
        case _:
            status, kind = 500, "internal_error"
    message = str(error) if kind != "internal_error" else f"the server failed on this request; its log has {request_id}"
    field_name = error.field if isinstance(error, RequestError) else None
    return {"error": {"code": status, "type": kind, "message": message, "field": field_name}}


def _header_value(value: object) -> str:
    """A value as a header may carry it: printable ASCII, so that nothing can end the line."""
    return "".join(character if " " <= character <= "~" else "?" for character in str(value))
