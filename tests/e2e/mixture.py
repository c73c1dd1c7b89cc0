"""Requests of every kind, to be sent at the same time."""

from __future__ import annotations

import base64
import io
import itertools
import random
from typing import Any

import soundfile

from tests.goldens.wavs import synth

FORMATS = ["wav", "mp3", "ogg", "flac", "pcm", "opus", "aac"]
WAYS: list[dict[str, Any]] = [{}, {"stream": True}, {"stream_format": "sse"}]
PROMPTS: list[dict[str, Any]] = [{"prompt": "80s pop"}, {"prompt": "warm jazz with a saxophone"}, {}]
STEERING: list[dict[str, Any]] = [
    {},
    {"cfg_coef": 1},  # one row instead of two
    {"two_step_cfg": True},
    {"use_sampling": False},
    {"top_p": 0.9, "temperature": 1.3},
    {"top_k": 5, "cfg_coef": 5},
    {"cfg_coef_beta": 2},  # three rows
]
RATES = [None, None, 22_050, 48_000]
LEVELS = ["loudness", "peak", "rms", "clip", "none"]


def mixture(count: int, longest: float, melodies: bool = False) -> list[dict[str, Any]]:
    """The fields of so many requests, the same ones each time.

    Every format comes whole, streamed and as events; every sixth request continues a clip, and with `melodies` every
    fourth follows one. Most clips are short.

    Args:
        longest: seconds of the longest clip.
    """
    draw = random.Random(count)
    bodies = []
    for number, (way, audio_format) in zip(range(count), itertools.cycle(itertools.product(WAYS, FORMATS))):
        duration = round(draw.uniform(0.4, 1) * longest ** draw.random(), 2)
        body = {
            **way,
            **PROMPTS[number % 3],
            **draw.choice(STEERING),
            "format": audio_format,
            "sample_rate": draw.choice(RATES),
            "normalization": draw.choice(LEVELS),
            "duration": duration,
            "seed": number,
        }
        if number % 6 == 5:
            body |= {"continuation": song(min(2, duration / 2)), "duration": duration + 0.5}
        if melodies and number % 4 == 3:
            body["melody"] = song(1 + number % 5, kind=number % 3)
        bodies.append(body)
    bodies[0]["duration"] = longest
    return bodies


def song(seconds: float, kind: int = 1) -> str:
    """A wav file in base64."""
    buffer = io.BytesIO()
    soundfile.write(buffer, synth(seconds, 32_000, kind).T.numpy(), 32_000, format="WAV", subtype="PCM_16")
    return base64.b64encode(buffer.getvalue()).decode()
