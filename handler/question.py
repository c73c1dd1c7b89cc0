"""What a client asks: a clip, what the model is, which models there are, or that a request be given up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from handler.request import GenerationRequest


@dataclass(frozen=True, slots=True)
class ClipQuestion:
    """For music.

    Attributes:
        request: what music, and how it is to be sent.
        openai: asked in the shape of OpenAI's speech endpoint, whose events differ from ours.
        ignored: the fields that were given and have no effect.
    """

    request: GenerationRequest
    openai: bool = False
    ignored: Sequence[str] = ()


@dataclass(frozen=True, slots=True)
class DescriptionQuestion:
    """For what the model is and which fields it takes."""


@dataclass(frozen=True, slots=True)
class ModelsQuestion:
    """For the models at this address, as OpenAI lists them."""


@dataclass(frozen=True, slots=True)
class CancelQuestion:
    """That a request, known by its client's own `x-request-id`, be given up."""

    request_id: str


Question = ClipQuestion | DescriptionQuestion | ModelsQuestion | CancelQuestion
