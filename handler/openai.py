"""The shape of OpenAI's API: what its speech endpoint is sent, and what its client libraries expect back.

Reference: `POST /v1/audio/speech` and `GET /v1/models` of OpenAI's API reference.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handler.errors import RequestError
from handler.request import ALIASES, shown

SPEECH_PATH = "v1/audio/speech"
MODELS_PATH = "v1/models"

NO_EFFECT = ("model", "voice", "speed", "instructions")
"""Fields of a speech request that mean nothing for music: accepted, for the client libraries send them."""

DEFAULT_FORMAT = "mp3"
FORMATS = ("mp3", "opus", "aac", "flac", "wav", "pcm")
"""The choices of OpenAI's `response_format`."""

PCM_SAMPLE_RATE = 24_000  # Hz; its `pcm` has no header, so its clients take this for granted

FORMAT_NAMES = {"format", *(alias for alias, name in ALIASES.items() if name == "format")}


def speech_fields(body: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A speech request's fields under our names, and those among them that have no effect.

    Our own fields (`duration`, `seed`, …) may stand beside OpenAI's, as its libraries' `extra_body` puts them there.
    The `sample_rate` of `pcm` is 24 kHz if it is not given.

    Raises:
        RequestError: without `input`, or for a format that is not made.
    """
    if body.get("input") is None:
        raise RequestError("input", "is missing; it is the text to play")
    fields = {name: value for name, value in body.items() if name not in NO_EFFECT and value is not None}
    if not fields.keys() & FORMAT_NAMES:
        fields["response_format"] = DEFAULT_FORMAT
    if "response_format" in fields and fields["response_format"] not in FORMATS:
        raise RequestError(
            "response_format", f"must be one of {', '.join(FORMATS)}, not {shown(fields['response_format'])}"
        )
    if "pcm" in [fields.get(name) for name in FORMAT_NAMES]:
        fields.setdefault("sample_rate", PCM_SAMPLE_RATE)
    return fields, [name for name in NO_EFFECT if name in body]


def models_list(variant: str, created: int) -> dict[str, Any]:
    """The list of models: the one that this address serves.

    Args:
        variant: its name.
        created: when it was loaded, in seconds since 1970.
    """
    model = {"id": variant, "object": "model", "created": created, "owned_by": "musicgen"}
    return {"object": "list", "data": [model]}
