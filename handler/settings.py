"""The `handler:` block of an archive's model-config.yaml."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

OVERRIDES = "MUSICGEN_SETTINGS"
"""The environment variable of a server whose JSON object goes before the `handler:` block of every archive."""


class SettingsError(Exception):
    """The `handler:` block holds a key nobody knows or a value out of its bounds; the message names both."""


class Settings(BaseModel):
    """What an operator can set for one archive; every key has a default, so the block may be missing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)

    device: str | None = Field(default=None, pattern=r"^(cpu|cuda(:\d{1,3})?)$")
    """`cpu`, `cuda` or `cuda:N`; default: the GPU TorchServe assigns to the worker, else `cpu`."""

    dtype: Literal["float32", "float16", "bfloat16", "int8"] | None = None
    """The language model's number format; default: float16 on a GPU, float32 on a CPU. float16 is for GPUs, int8 for
    CPUs."""

    max_duration: float = Field(default=120.0, gt=0, le=3600, allow_inf_nan=False)
    """The longest clip a request may ask for, in seconds (beyond the model's own 30 s: windows)."""

    max_prompt_tokens: int = Field(default=512, ge=1, le=4096)
    """The longest prompt, in tokens of the text encoder."""

    max_concurrency: int = Field(default=8, ge=1, le=1024)
    """How many requests run together, if memory holds as many; the others wait."""

    max_queue: int = Field(default=64, ge=0, le=100_000)
    """How many requests may wait besides those that run; one more gets a 503 with Retry-After at once."""

    timeout: float = Field(default=600.0, gt=0, le=86_400, allow_inf_nan=False)
    """Seconds after which a request is given up: the default and the upper bound of its own `timeout`."""

    max_upload_bytes: int = Field(default=32 * 2**20, ge=1024, le=2**30)
    """The largest uploaded audio file, in bytes after base64. TorchServe's `max_request_size` bounds it too."""

    max_upload_seconds: float = Field(default=600.0, gt=0, le=3600, allow_inf_nan=False)
    """The longest uploaded audio, in seconds."""

    memory_budget: int | None = Field(default=None, ge=1)
    """Bytes for the model and for the keys and values of running requests, claimed at start; default: what the model
    takes, and half of the memory that is free then on the machine or in its container, or 85 % of a GPU's."""

    audio_budget: int = Field(default=2**30, ge=2**20)
    """Bytes of audio that all requests, waiting and running, may bring together: their files and what is decoded of
    them. One more gets a 503 with Retry-After at once. The worker holds them, and the engine once more."""

    threads: int | None = Field(default=None, ge=1, le=1024)
    """Threads of the engine on a CPU; default: as many as cores, or the whole cores of a container's quota."""

    deterministic: bool = True
    """On a GPU: every decode step computes all rows there can be, so that a request has the same bits whoever runs
    beside it; a step of few requests takes as long as a full one. A CPU always gives the same bits."""

    cuda_graphs: bool = True
    """On a GPU: capture the decode step once and replay it; false is for finding faults."""

    stream_chunk_seconds: float = Field(default=1.0, ge=0.04, le=10, allow_inf_nan=False)
    """Seconds of audio decoded at a time; the first chunk is half of it."""

    @classmethod
    def from_model_config(cls, model_config: Mapping[str, Any] | None, overrides: str | None = None) -> Settings:
        """Read the `handler:` block of a parsed model-config.yaml, and what goes before it.

        Args:
            model_config: the whole file.
            overrides: a JSON object of settings, null being the default: the value of `OVERRIDES`.

        Raises:
            SettingsError: for an unknown key, a wrong type or a value out of bounds, naming the key and the bounds.
        """
        block = (model_config or {}).get("handler")
        block = {} if block is None else block
        if not isinstance(block, Mapping):
            raise SettingsError("model-config.yaml: `handler` must be a block of `key: value` lines")
        try:
            return cls.model_validate({**block, **_overrides(overrides)})
        except ValidationError as error:
            raise SettingsError("; ".join(_complaint(problem) for problem in error.errors())) from error


def _overrides(text: str | None) -> dict[str, Any]:
    try:
        settings = json.loads(text or "{}")
    except ValueError as error:
        raise SettingsError(f"the environment's {OVERRIDES} is not JSON: {error}") from error
    if not isinstance(settings, dict):
        raise SettingsError(f'the environment\'s {OVERRIDES} must be a JSON object, such as {{"device": "cpu"}}')
    return settings


def _complaint(problem: Any) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        return (
            f"model-config.yaml: `handler.{key}` is not a setting; the settings are {', '.join(Settings.model_fields)}"
        )
    return f"model-config.yaml: `handler.{key}` is {problem['input']!r}: {problem['msg']}"
