"""What every conditioner is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from handler.conditioners.fuser import Condition


class Conditioner(nn.Module, ABC):
    """Turns one input into vectors of the language model's dimension.

    Args:
        dim: of what it computes.
        output_dim: the language model's.
    """

    def __init__(self, dim: int, output_dim: int) -> None:
        super().__init__()
        self.output_dim = output_dim
        self.output_proj = nn.Linear(dim, output_dim)

    @abstractmethod
    def null(self, length: int) -> Condition:
        """The condition of an absent input, beside one of `length` vectors (see `rows_of` in `provider.py`)."""

    def _zeros(self, length: int) -> Condition:
        return Condition(torch.zeros(1, length, self.output_dim), is_null=True)


class TextConditioner(Conditioner):
    """A conditioner of text, whose null condition is zeros, as many as the text has vectors."""

    @abstractmethod
    def forward(self, text: str | None) -> Condition:
        """One text -> its condition, on the CPU; None is the null condition of length 1."""

    def null(self, length: int) -> Condition:
        return self._zeros(length)

    def _project(self, hidden: Tensor) -> Condition:
        return Condition(self.output_proj(hidden).float().cpu())


@dataclass(frozen=True, slots=True)
class WavInput:
    """The audio one request is conditioned on, and how to take it in.

    Attributes:
        wav: mono, float32 `[T]`.
        sample_rate: in Hz.
        seed: of the request; whatever a conditioner draws is a function of it.
        eval_q, excerpt_length, ds_factor, encodec_n_q: of the style conditioner; None is the checkpoint's.
    """

    wav: Tensor
    sample_rate: int
    seed: int = 0
    eval_q: int | None = None
    excerpt_length: float | None = None
    ds_factor: int | None = None
    encodec_n_q: int | None = None


class WavConditioner(Conditioner):
    """A conditioner of audio.

    Attributes:
        max_length: the most vectors its condition has.
    """

    max_length: int

    def check(self, wav: WavInput) -> None:
        """Raises a RequestError for audio or settings this conditioner cannot take, before any work is done."""

    @abstractmethod
    def forward(self, wav: WavInput | None) -> Condition:
        """One piece of audio -> its condition, on the CPU; None is the null condition by itself."""
