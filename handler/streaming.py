"""Replies that are sent while the clip is made: audio as it is, or audio and progress as server-sent events."""

from __future__ import annotations

import asyncio
import base64
import json
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import aclosing, closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from handler.audio_encoder import StreamEncoder
from handler.engine.messages import Audio, Card, Done, Event, Failed, Progress, Started
from handler.reply import clip_headers, error_content
from handler.request import GenerationRequest
from handler.stream_audio import StreamLevel

EVENT_STREAM = "text/event-stream"


@dataclass(frozen=True, slots=True)
class StreamedReply:
    """A reply with status 200 whose body comes piece by piece."""

    content_type: str
    body: AsyncIterator[bytes]
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EventNames:
    """How one dialect of server-sent events tells what happens; a function gives an event's data.

    Attributes:
        named: whether each event has an `event:` line of its own.
    """

    named: bool
    progress: Callable[[int, int], dict[str, Any] | None]
    audio: Callable[[bytes], dict[str, Any]]
    done: Callable[[dict[str, Any]], dict[str, Any]]


OURS = EventNames(
    named=True,
    progress=lambda done, total: {"type": "progress", "done": done, "total": total},
    audio=lambda data: {"type": "audio", "audio": _base64(data)},
    done=lambda about: {"type": "done", **about},
)
"""`progress`, `audio` (base64 of the next bytes of the file) and `done` with the clip's metadata."""

OPENAI = EventNames(
    named=False,
    progress=lambda done, total: None,
    audio=lambda data: {"type": "speech.audio.delta", "audio": _base64(data)},
    done=lambda about: {"type": "speech.audio.done", "usage": about},
)
"""Those of OpenAI's speech endpoint."""


async def streamed_reply(
    events: AsyncIterator[Event],
    request: GenerationRequest,
    card: Card,
    variant: str,
    request_id: str,
    names: EventNames = OURS,
) -> StreamedReply:
    """Waits until the engine begins with the job, which decides the status; what follows is the reply's body.

    Args:
        events: of the request's job.
        request: what was asked for.
        card: of the model.
        variant: its name.
        request_id: for the error of a stream that breaks off.
        names: the dialect, where events are asked for.

    Raises:
        Exception: whatever ended the job before the engine began with it.
    """
    async for event in events:
        if isinstance(event, Failed):
            raise event.error
        if isinstance(event, Started):
            break
    pieces = _Pieces(request, card)
    about = {
        "seed": request.seed,
        "sample_rate": pieces.encoder.sample_rate,
        "channels": card.channels,
        "duration": int(request.duration * card.frame_rate) / card.frame_rate,
        "variant": variant,
    }
    headers = clip_headers(about)
    if request.stream_format == "sse":
        about["format"] = request.format
        body = _released(_events(events, pieces, about, request_id, names), pieces)
        return StreamedReply(EVENT_STREAM, body, headers)
    return StreamedReply(pieces.encoder.content_type, _released(_audio(events, pieces), pieces), headers)


class _Pieces:
    """Sets the level of a stream and encodes it, off the loop."""

    def __init__(self, request: GenerationRequest, card: Card) -> None:
        samples = round(int(request.duration * card.frame_rate) * card.sample_rate / card.frame_rate)
        self.encoder = StreamEncoder(
            request.format, card.sample_rate, card.channels, samples, request.seed, request.sample_rate
        )
        self._level = StreamLevel(request.normalization, card.sample_rate)
        self._lock = threading.Lock()

    async def push(self, audio: Audio) -> bytes:
        return await asyncio.to_thread(self._push, torch.from_numpy(audio.wav))

    async def finish(self) -> bytes:
        return await asyncio.to_thread(self._finish)

    def close(self) -> None:
        """Release the encoder, after the push that may still run in a thread when its waiter is cancelled."""
        with self._lock:
            self.encoder.close()

    def _push(self, wav: Tensor) -> bytes:
        with self._lock:
            return self.encoder.push(self._level.push(wav))

    def _finish(self) -> bytes:
        with self._lock:
            return self.encoder.push(self._level.finish()) + self.encoder.finish()


async def _released(body: AsyncGenerator[bytes, None], pieces: _Pieces) -> AsyncGenerator[bytes, None]:
    """The body; at its end, or where it breaks off, the encoder is released."""
    with closing(pieces):
        async with aclosing(body):
            async for piece in body:
                yield piece


async def _audio(events: AsyncIterator[Event], pieces: _Pieces) -> AsyncGenerator[bytes, None]:
    """A file's bytes; one that must break off ends short of its `x-duration`, and raises what broke it off."""
    async for event in events:
        match event:
            case Audio():
                yield await pieces.push(event)
            case Done():
                yield await pieces.finish()
            case Failed(error):
                try:
                    raise error
                finally:
                    del error, event  # or this frame and the error would hold each other, and all the callers' audio


async def _events(
    events: AsyncIterator[Event], pieces: _Pieces, about: dict[str, Any], request_id: str, names: EventNames
) -> AsyncGenerator[bytes, None]:
    """Server-sent events; what must break off ends with an `error` event, and raises what broke it off."""
    try:
        async for event in events:
            for content in await _told(event, pieces, about, names):
                yield _event(content, names)
    except Exception as error:
        yield _event({"type": "error", **error_content(error, request_id)}, names)
        raise


async def _told(event: Event, pieces: _Pieces, about: dict[str, Any], names: EventNames) -> list[dict[str, Any]]:
    """The server-sent events that follow from one of the engine's."""
    match event:
        case Progress(done, total):
            told = [names.progress(done, total)]
        case Audio():
            told = [names.audio(data) for data in [await pieces.push(event)] if data]
        case Done():
            told = [names.audio(data) for data in [await pieces.finish()] if data]
            told.append(names.done(about))
        case Failed(error):
            try:
                raise error
            finally:
                del error, event  # as above
        case _:
            told = []
    return [content for content in told if content is not None]


def _event(content: dict[str, Any], names: EventNames) -> bytes:
    line = f"event: {content['type']}\n" if names.named else ""
    return f"{line}data: {json.dumps(content)}\n\n".encode()


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()
