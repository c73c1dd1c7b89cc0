"""The tiny models whose outputs audiocraft recorded, and what their recordings were made with."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from unittest import mock

import torch
from torch.nn import functional as F

from handler.conditioners.base import WavInput
from handler.conditioners.provider import ConditioningProvider, Conditions
from handler.musicgen import MusicGen

GOLDENS = Path(__file__).parent.parent / "goldens"

D2 = ["happy rock", "an 80s driving pop song with heavy drums and a bassy synth, epic and loud"]
"""The prompts of the recordings: 8 and 35 T5 tokens."""


@cache
def load(name: str) -> MusicGen:
    """A recorded model; tests restore what they change of it."""
    return MusicGen.get_pretrained(GOLDENS / name, device="cpu", hub_dir=GOLDENS / "hub")


def padded_to(length: int) -> mock._patch[object]:
    """Pads every text's condition with zero vectors, as audiocraft pads the texts of one batch to the longest.

    We never pad, so this is how the recordings of padded batches are derived again, prompt by prompt.
    """
    encode = ConditioningProvider.encode

    def padded(self: ConditioningProvider, description: str | None, wav: WavInput | None = None) -> Conditions:
        conditions = encode(self, description, wav)
        for name in self.texts:
            embedding = conditions[name].embedding
            extra = length - embedding.shape[1]
            conditions[name] = replace(conditions[name], embedding=F.pad(embedding, (0, 0, 0, extra)))
        return conditions

    return mock.patch.object(ConditioningProvider, "encode", padded)


def max_difference(actual: torch.Tensor, expected: object) -> float:
    """The largest absolute difference, NaN only where both are."""
    wanted = torch.as_tensor(expected)
    assert torch.equal(actual.isnan(), wanted.isnan())
    return float((actual - wanted).nan_to_num().abs().max())
