"""The shape of Replicate's API: the input of its model meta/musicgen.

Reference: https://replicate.com/meta/musicgen/api and `predict.py` of cog-musicgen.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from handler.errors import RequestError
from handler.request import shown

AUDIO = "input_audio"
BOOLEANS = ("multi_band_diffusion", "continuation")
"""Fields that are true or false in this shape; our own `continuation` is audio."""

NO_EFFECT = ("model_version", "multi_band_diffusion", "version")
"""Fields that are accepted and change nothing: the address decides the model, and EnCodec decodes the audio."""


def replicate_fields(body: Mapping[str, Any], condition: str | None) -> tuple[dict[str, Any], list[str]]:
    """A request's fields under our names, and those among them that have no effect; ours stay as they are.

    An object as `input` holds fields of the request. `input_audio` is the audio to continue if `continuation` is true,
    otherwise the audio that the model is conditioned on.

    Args:
        body: what was sent; None stands for a field that is not given.
        condition: the field of the audio that this model is conditioned on, `melody` or `style`, or None.

    Raises:
        RequestError: for audio that this model does not take, `continuation` without audio, a field that is given
            inside `input` and beside it, or `multi_band_diffusion`.
    """
    fields = _unwrapped(body)
    diffusion = fields.get("multi_band_diffusion", False)
    if not isinstance(diffusion, bool | None):
        raise RequestError("multi_band_diffusion", f"must be true or false, not {shown(diffusion)}")
    if diffusion:
        raise RequestError(
            "multi_band_diffusion", "is not available: EnCodec decodes the audio; leave it out, or give false"
        )
    ignored = [name for name in NO_EFFECT if name in fields]
    fields = {name: value for name, value in fields.items() if name not in NO_EFFECT}
    audio = fields.pop(AUDIO, None)
    if isinstance(fields.get("continuation"), bool):
        name = "continuation" if fields.pop("continuation") else condition
        if name == "continuation" and audio is None:
            raise RequestError(
                "continuation", f"is true, but there is no audio to continue; give it in `{AUDIO}` or `continuation`"
            )
    else:
        name = condition
    if audio is None:
        return fields, ignored
    if name is None:
        raise RequestError(
            AUDIO,
            "this model follows neither a melody nor a style; to have the audio continued, set `continuation` to true",
        )
    if fields.get(name) is not None:
        raise RequestError(name, f"is given more than once (`{AUDIO}` means `{name}` here)")
    return {**fields, name: audio}, ignored


def _unwrapped(body: Mapping[str, Any]) -> dict[str, Any]:
    inner = body.get("input")
    if not isinstance(inner, Mapping):
        return dict(body)
    outer = {name: value for name, value in body.items() if name != "input" and value is not None}
    if twice := outer.keys() & inner.keys():
        raise RequestError(str(min(twice))[:40], "is given more than once: inside `input` and beside it")
    return {**outer, **inner}
