"""What a client may ask for: every field, its bounds and its aliases."""

from __future__ import annotations

import json
import math
import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    InstanceOf,
    ValidationInfo,
    WithJsonSchema,
    create_model,
    model_validator,
)

from handler.errors import RequestError
from handler.upload import Upload, open_upload

ALIASES = {
    "description": "prompt",
    "input": "prompt",
    "text": "prompt",
    "classifier_free_guidance": "cfg_coef",
    "output_format": "format",
    "response_format": "format",
    "normalization_strategy": "normalization",
}

DEFAULT_DURATION = 8.0
MAX_SEED = 2**63 - 1
MINUS_ONE = -1  # for a random seed, and for the end of the audio, as Replicate's clients have it
DRAWN_SEEDS = 2**53  # JavaScript's numbers keep every whole number below it
MAX_CHARACTERS_PER_TOKEN = 32  # of a prompt; no word piece of T5's is longer

CONDITION_FIELDS = {"chroma": ("melody",), "style": ("style", "eval_q", "excerpt_length", "ds_factor")}
"""The fields that only models conditioned on this kind of audio have; the audio itself first."""

MAX_STYLE_VECTORS = 512
STYLE_VECTORS_PER_SECOND = 75  # MERT's; of these one in `ds_factor` is kept
PUBLISHED_EXCERPT_LENGTH, PUBLISHED_DS_FACTOR = 3.0, 15  # what a style model takes for null


@dataclass(frozen=True, slots=True)
class Limits:
    """The bounds that depend on the archive (its settings and its model).

    Attributes:
        max_duration: the longest clip, in seconds.
        timeout: the default and the largest `timeout`, in seconds.
        max_prompt_tokens: the longest prompt, in tokens of the text encoder.
        max_upload_bytes, max_upload_seconds: of an uploaded audio file.
        frame_rate: the model's frames a second; a clip has at least one.
        window: seconds the model generates in one go.
        melody: the kind of audio the model is conditioned on, `chroma` or `style`, or None.
        style_codebooks: the most `eval_q` of a style model; 0: its style is not quantized.
    """

    max_duration: float
    timeout: float
    max_prompt_tokens: int
    max_upload_bytes: int
    max_upload_seconds: float
    frame_rate: float
    window: float
    melody: str | None = None
    style_codebooks: int = 6


def _open_audio(value: Any, info: ValidationInfo) -> Upload | None:
    if value is None:
        return None
    limits = cast(Limits, info.context)
    field = str(info.field_name)
    if value == "":
        raise RequestError(field, "the audio is empty; for no audio, leave the field out or give null")
    if not isinstance(value, str | bytes | bytearray):
        raise RequestError(field, f"must be a base64 text or an uploaded file, not {shown(value)}")
    return open_upload(value, field, limits.max_upload_bytes, 1 / limits.frame_rate, limits.max_upload_seconds)


def _draw_seed(value: Any = None) -> Any:
    return secrets.randbelow(DRAWN_SEEDS) if value is None or _is_minus_one(value) else value


def _end_of_audio(value: Any) -> Any:
    return None if _is_minus_one(value) else value


def _is_minus_one(value: Any) -> bool:
    return isinstance(value, int | float) and value == MINUS_ONE


AudioField = Annotated[
    InstanceOf[Upload] | None,
    BeforeValidator(_open_audio),
    WithJsonSchema({"type": "string", "contentEncoding": "base64", "nullable": True}),
]

SampleRate = Literal[8000, 16000, 22050, 24000, 32000, 44100, 48000] | None


class GenerationRequest(BaseModel):
    """One request for one clip, every value known and in bounds.

    The fields are those of the API; `for_archive` gives the class with an archive's own bounds. A `cfg_coef_beta` makes
    the guidance double and `two_step_cfg` has no effect then, as in audiocraft.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )

    prompt: str | None = None
    """What to play; empty or absent: unconditional."""
    duration: float = DEFAULT_DURATION
    """Seconds of the whole reply, a continued excerpt included."""
    melody: AudioField = None
    """An audio file (wav, flac, mp3, ogg, m4a, …) whose melody to follow, from its beginning on."""
    style: AudioField = None
    """An audio file (wav, flac, mp3, ogg, m4a, …) whose style to take, from an excerpt of it."""
    continuation: AudioField = None
    """An audio file (wav, flac, mp3, ogg, m4a, …) to continue; what is continued is shorter than the model's
    window and `duration`."""
    continuation_start: float | None = Field(default=None, ge=0)
    """Where the excerpt to continue begins in that audio, in seconds; null: at its beginning."""
    continuation_end: Annotated[float | None, BeforeValidator(_end_of_audio)] = Field(
        default=None, gt=0, json_schema_extra={"also": MINUS_ONE}
    )
    """Where the excerpt to continue ends in that audio, in seconds; null or -1: at its end."""
    seed: Annotated[int, BeforeValidator(_draw_seed)] = Field(
        default_factory=_draw_seed, ge=0, le=MAX_SEED, json_schema_extra={"also": MINUS_ONE}
    )
    """Decides every draw; absent: one below 2^53 is drawn and reported, or computed from the address for a GET; -1:
    one is drawn."""
    timeout: float = 600.0
    """Seconds until the request is given up."""
    temperature: float = Field(default=1.0, ge=0, le=10)
    """Above 1 is more adventurous; 0 takes the likeliest token."""
    top_k: int = Field(default=250, ge=0, le=1_000_000)
    """Draw from this many of the likeliest tokens; above the number of codes: from all; 0 switches it off."""
    top_p: float = Field(default=0.0, ge=0, le=1)
    """Draw from the likeliest tokens of this total probability; 0 switches it off, else it wins over top_k."""
    use_sampling: bool = True
    """Draw tokens; false: take the likeliest."""
    cfg_coef: float = Field(default=3.0, ge=-100, le=100)
    """Strength of the classifier-free guidance; 1 is none."""
    cfg_coef_beta: float | None = Field(default=None, ge=-100, le=100)
    """Strength of the text in double guidance; null: simple guidance."""
    two_step_cfg: bool = False
    """Run the two halves of the guidance one after the other."""
    extend_stride: float | None = Field(default=None, gt=0)
    """Seconds a window moves on when a clip is longer than one; null: the model's own."""
    eval_q: int | None = Field(default=None, ge=1)
    """How many codebooks describe the style; null: the checkpoint's."""
    excerpt_length: float | None = Field(default=None, gt=0, le=30)
    """Seconds of the style audio that are looked at; null: the checkpoint's."""
    ds_factor: int | None = Field(default=None, ge=1, le=1000)
    """Keep one in this many frames of the style; null: the checkpoint's."""
    format: Literal["wav", "flac", "mp3", "ogg", "opus", "aac", "pcm", "json"] = "wav"
    """Of the reply: an audio file, raw 16-bit samples, or JSON with a base64 wav; ogg and opus are both Ogg Opus."""
    sample_rate: SampleRate = None
    """Of the audio sent, in Hz; null: the model's. Opus is sent at 48000 Hz instead of 22050, 32000 or 44100."""
    normalization: Literal["loudness", "peak", "rms", "clip", "none"] = "loudness"
    """How the level of the clip is set."""
    stream: bool = False
    """Send audio while it is generated."""
    stream_format: Literal["audio", "sse"] = "audio"
    """Of a stream: audio, or progress and audio as events; `sse` always streams."""

    @classmethod
    def for_archive(cls, limits: Limits) -> type[GenerationRequest]:
        """This class with the bounds of an archive."""
        shortest = math.ceil(1e4 / limits.frame_rate) / 1e4
        longest = limits.max_duration
        text = cls.model_fields
        return create_model(
            cls.__name__,
            __base__=cls,
            prompt=(
                str | None,
                Field(
                    default=None,
                    max_length=limits.max_prompt_tokens * MAX_CHARACTERS_PER_TOKEN,
                    description=f"{text['prompt'].description} At most {limits.max_prompt_tokens} tokens.",
                ),
            ),
            duration=(
                float,
                Field(
                    default=min(DEFAULT_DURATION, longest),
                    ge=shortest,
                    le=longest,
                    description=text["duration"].description,
                ),
            ),
            timeout=(
                float,
                Field(default=limits.timeout, gt=0, le=limits.timeout, description=text["timeout"].description),
            ),
            extend_stride=(
                float | None,
                Field(default=None, ge=shortest, lt=limits.window, description=text["extend_stride"].description),
            ),
            eval_q=(
                int | None,
                Field(default=None, ge=1, le=max(1, limits.style_codebooks), description=text["eval_q"].description),
            ),
        )

    def without_audio(self) -> GenerationRequest:
        """The same without what was uploaded."""
        return self.model_copy(update={"melody": None, "style": None, "continuation": None})

    @property
    def streams(self) -> bool:
        """Whether the reply is sent while the clip is made."""
        return self.stream or self.stream_format == "sse"

    @model_validator(mode="after")
    def _check_stream(self) -> Self:
        if self.streams and self.format == "json":
            raise RequestError(
                "format", "json is one whole reply; to stream, ask for an audio format, as events with `stream_format`"
            )
        return self

    @model_validator(mode="after")
    def _check_style(self) -> Self:
        for field in CONDITION_FIELDS["style"]:
            if self.style is None and getattr(self, field) is not None:
                raise RequestError(field, "needs the audio it is about, in `style`")
        length = PUBLISHED_EXCERPT_LENGTH if self.excerpt_length is None else self.excerpt_length
        factor = PUBLISHED_DS_FACTOR if self.ds_factor is None else self.ds_factor
        vectors = math.ceil(length * STYLE_VECTORS_PER_SECOND / factor)
        if vectors > MAX_STYLE_VECTORS:
            raise RequestError(
                "ds_factor" if self.excerpt_length is None else "excerpt_length",
                f"{length:g} seconds and a ds_factor of {factor} make {vectors} vectors of style "
                f"({STYLE_VECTORS_PER_SECOND} a second / ds_factor), and {MAX_STYLE_VECTORS} are the most; ask for at "
                f"most {factor * MAX_STYLE_VECTORS / STYLE_VECTORS_PER_SECOND:.4g} seconds, or for a ds_factor of at "
                f"least {math.ceil(length * STYLE_VECTORS_PER_SECOND / MAX_STYLE_VECTORS)}",
            )
        return self

    @model_validator(mode="after")
    def _check_excerpt(self, info: ValidationInfo) -> Self:
        limits = cast(Limits, info.context)
        if self.continuation is None:
            for field in ("continuation_start", "continuation_end"):
                if getattr(self, field):  # a start of 0 is the default of some clients
                    raise RequestError(field, "needs the audio it is about, in `continuation`")
        elif self.continuation_end is not None:
            self.check_excerpt(self.continuation_end, limits.frame_rate, limits.window)
        return self

    def check_length(self, seconds: float) -> None:
        """See that the excerpt to continue lies within its audio, which lasts so long.

        Raises:
            RequestError: it does not.
        """
        for field in ("continuation_start", "continuation_end"):
            time = getattr(self, field)
            if time is not None and time > seconds:
                raise RequestError(field, f"must be at most {seconds:.6g}, the audio's length, not {time:g}")

    def check_excerpt(self, end: float, frame_rate: float, window: float, at_least: bool = False) -> None:
        """See that the model can continue the excerpt that ends there, in seconds.

        Args:
            at_least: whether it may be longer than that: only what makes it too long is looked for.

        Raises:
            RequestError: it is too short, or too long.
        """
        start, more = self.continuation_start or 0.0, " or more" if at_least else ""
        if end - start < 1 / frame_rate and not at_least:
            given = [f for f in ("continuation_end", "continuation_start") if getattr(self, f) is not None]
            raise RequestError(
                given[0] if given else "continuation",
                f"the excerpt to continue must last at least {1 / frame_rate:.4g} seconds, not {end - start:.4g}",
            )
        frames = math.ceil(round((end - start) * frame_rate, 6))  # as the model counts them
        if frames >= int(window * frame_rate):
            raise RequestError(
                "continuation",
                f"the excerpt to continue must be at least a frame ({1 / frame_rate:.4g} s) shorter than the model's "
                f"window of {window:g} seconds, not {end - start:.6g}{more}; choose a part of it with "
                "`continuation_start` and `continuation_end`",
            )
        if frames >= int(self.duration * frame_rate):
            raise RequestError(
                "duration",
                f"counts the excerpt to continue, {end - start:.6g} seconds{more}, and must be "
                f"at least a frame ({1 / frame_rate:.4g} s) longer than it; it is {self.duration:g}",
            )


def shown(value: Any) -> str:
    """A value as an error message can show it: short, whatever was sent."""
    match value:
        case dict():
            return "an object"
        case list():
            return "a list"
        case bool() | None:
            return json.dumps(value)
        case int() if abs(value) >= 10**20:
            return "a huge number"
        case str() | int() | float():
            text = repr(value[:41] if isinstance(value, str) else value)
            return text if len(text) <= 44 else text[:40] + "…'"
    return f"{len(value)} bytes" if isinstance(value, bytes | bytearray) else type(value).__name__
