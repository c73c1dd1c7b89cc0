"""Audio processed while it is made: its level set and its rate converted, however it is cut into pieces."""

from __future__ import annotations

from handler.stream_audio.level import StreamLevel
from handler.stream_audio.resampler import StreamResampler

__all__ = ["StreamLevel", "StreamResampler"]
