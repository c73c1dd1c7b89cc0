"""All conditioners of a model, and the rows of conditions that guidance needs."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from handler.conditioners.base import Conditioner, TextConditioner, WavConditioner, WavInput
from handler.conditioners.fuser import Condition

Conditions = dict[str, Condition]
"""The conditions of one row by name, in the order they are fused."""

DESCRIPTION = "description"
"""The text conditioner a request's prompt goes to; others, if a model has them, are always null."""

SELF_WAV = "self_wav"
"""The audio conditioner a request's melody or style excerpt goes to."""


class ConditioningProvider(nn.Module):
    """The `conditioners` of the `xp.cfg`, by name.

    Args:
        conditioners: by name, in the order of the config. They are fused text first.
    """

    def __init__(self, conditioners: Mapping[str, Conditioner]) -> None:
        super().__init__()
        self.conditioners = nn.ModuleDict(conditioners)
        self.texts = {n: c for n, c in conditioners.items() if isinstance(c, TextConditioner)}
        self.wavs = {n: c for n, c in conditioners.items() if isinstance(c, WavConditioner)}

    def encode(self, description: str | None, wav: WavInput | None = None) -> Conditions:
        """The conditions of one request."""
        conditions = {name: text(description if name == DESCRIPTION else None) for name, text in self.texts.items()}
        conditions |= {name: audio(wav if name == SELF_WAV else None) for name, audio in self.wavs.items()}
        return conditions

    def nulls(self, like: Conditions | None = None) -> Conditions:
        """The null conditions, padded as those of a request are, or by themselves."""
        return {
            name: conditioner.null(like[name].embedding.shape[1] if like else 1)
            for name, conditioner in (self.texts | self.wavs).items()
        }


def rows_of(
    provider: ConditioningProvider, conditions: Conditions, guided: bool, double: bool, two_step: bool
) -> list[list[Conditions]]:
    """The rows of one request, in groups of equal prefix length.

    In the reference the null rows are made together with the others and padded to their length; for prepended
    conditions that padding is part of the meaning. With `two_step` they are made apart, so not padded.

    Args:
        provider: makes the null conditions.
        conditions: of the request.
        guided: whether there is any guidance; without it there is one row.
        double: whether guidance is double: a row without the text comes between (MusicGen-Style, section 4.3).
        two_step: whether the null row stands apart (`two_step_cfg`; double guidance ignores it, as audiocraft does).
    """
    if not guided or all(condition.is_null for condition in conditions.values()):
        # Guidance between equal rows changes nothing.
        return [[conditions]]
    nulls = provider.nulls(conditions)
    if double:
        wav_only = {n: nulls[n] if n in provider.texts else c for n, c in conditions.items()}
        return [[conditions, wav_only, nulls]]
    if two_step:
        return [[conditions], [provider.nulls()]]
    return [[conditions, nulls]]
