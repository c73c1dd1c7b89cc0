"""Audio sent while it is made: its level set and its file written piece by piece, however it is cut into pieces."""

from __future__ import annotations

from handler.stream_audio.encoder import StreamEncoder
from handler.stream_audio.level import StreamLevel

__all__ = ["StreamEncoder", "StreamLevel"]
