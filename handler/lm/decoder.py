"""The decoder: a fixed set of rows in which requests are prefilled, stepped together, and leave.

One request holds one row without guidance, two with it, three with double guidance. Each decode step runs every
active row once; requests join and leave between steps. Nothing a request yields depends on who else is here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handler.errors import ModelDivergedError
from handler.lm.attention import CrossKV, KVCache
from handler.lm.block_attention import BlockCache
from handler.lm.conditions import FusedConditions
from handler.lm.model import LanguageModel
from handler.lm.sampling import Sampling, draw, guide, keep_top_k, keep_top_p

UNKNOWN = -1
"""Stands in a sequence where a code is still to be generated."""


@dataclass(frozen=True, slots=True)
class Guidance:
    """How the logits of a request's rows are combined; `beta` is for the three rows of double guidance."""

    coef: float = 1.0
    beta: float = 1.0


@dataclass(frozen=True, slots=True)
class Window:
    """One stretch of one request: what is known of its sequence, and how to fill the rest.

    Attributes:
        sequence: int64 `[K, S]`, laid out by the pattern: special tokens, known codes, and `UNKNOWN`.
        start: the first step to sample, at least 1.
        conditions: of its rows, in the order conditional, wav only (double guidance), null; in one group, or in two
            where the null row has a prefix of another length.
        guidance, sampling: what makes a token of the rows' logits.
        draws: uniform numbers float32 `[S - start, K]`, one for each token.
    """

    sequence: Tensor
    start: int
    conditions: Sequence[FusedConditions]
    guidance: Guidance
    sampling: Sampling
    draws: Tensor

    @property
    def rows(self) -> int:
        return sum(group.rows for group in self.conditions)

    @property
    def positions(self) -> int:
        """The cache positions it needs; the last token is never read back."""
        return max(group.prefix.shape[1] for group in self.conditions) + self.sequence.shape[1] - 1


@dataclass(slots=True)
class Slot:
    """A window under way.

    Attributes:
        index: its place in the per-request tensors.
        rows: its rows of the cache.
        window: what it generates.
        step: the newest step that holds a token.
    """

    index: int
    rows: range
    window: Window
    step: int

    @property
    def done(self) -> bool:
        return self.step == self.window.sequence.shape[1] - 1


class Decoder(ABC):
    """Runs windows together, exactly as each would run alone.

    Args:
        lm: the language model.
        cache: for the keys and values of as many rows as windows under way can have together.
        sequences: int64 `[requests, K, S]`, for the codes of as many windows as can be under way at once.
        draws: float32 `[requests, S, K]`, for their uniform numbers.
        condition_length: the longest cross-attention source there is room for.
        diverged: int32 `[requests]`, 1 where a window's logits have not been finite; None: claimed here.
    """

    def __init__(
        self,
        lm: LanguageModel,
        cache: KVCache | BlockCache,
        sequences: Tensor,
        draws: Tensor,
        condition_length: int,
        diverged: Tensor | None = None,
    ) -> None:
        self.lm, self.cache, self.sequences, self.draws = lm, cache, sequences, draws
        self.diverged = torch.zeros(len(sequences), dtype=torch.int32) if diverged is None else diverged
        self.condition_length = condition_length
        self.slots: list[Slot] = []
        self._free_rows = [True] * cache.keys.shape[1]

    def has_room(self, window: Window) -> bool:
        """Whether `join` would find a place for a window now."""
        return len(self.slots) < len(self.sequences) and self._gap(window.rows) is not None

    def sequence_of(self, slot: Slot) -> Tensor:
        """The sequence of a window under way, int64 `[K, S]`; `UNKNOWN` beyond its newest step."""
        return self.sequences[slot.index, :, : slot.window.sequence.shape[1]]

    def require_finite(self, slot: Slot) -> None:
        """Checks that the logits of a window's tokens so far were numbers; on a GPU it waits for the steps to be made.

        Raises:
            ModelDivergedError: they were not, so its codes mean nothing.
        """
        if not bool(self.diverged[slot.index]):
            return
        dtype = self.lm.weight_dtype
        wider = "or, if other prompts fail too, serve" if dtype is torch.float32 else "serve it in float32, or"
        raise ModelDivergedError(
            f"the model diverged: its logits are not finite numbers (NaN or infinity) in "
            f"{str(dtype).removeprefix('torch.')}, so there is no music to return. Ask for a cfg_coef nearer to 3, "
            f"{wider} an earlier checkpoint of this model."
        )

    def join(self, window: Window) -> Slot:
        """Prefills a window and samples its first token.

        Raises:
            MemoryError: when no place is left for it.
            ValueError: when it has conditions that this decoder was not made for.
        """
        for group in window.conditions:
            self._check(group)
        slot = Slot(self._free_index(), self._claim(window.rows), window, window.start - 1)
        self.diverged[slot.index] = 0
        try:
            self._prefill(slot)
        except BaseException:
            self._free(slot)
            raise
        self.slots.append(slot)
        return slot

    def _check(self, group: FusedConditions) -> None:
        """Whether there is room for the conditions of some rows."""
        if group.cross is not None and group.cross.shape[1] > self.condition_length:
            raise ValueError(
                f"a condition has {group.cross.shape[1]} vectors, and this decoder holds {self.condition_length}; "
                "raise its `condition_length`"
            )

    @abstractmethod
    def _take_in(self, first_row: int, group: FusedConditions, cross: CrossKV | None) -> None:
        """Keeps what the steps of some rows, from a first row of the cache on, need of their conditions."""

    def _prefill(self, slot: Slot) -> None:
        window = slot.window
        steps = window.sequence.shape[1]
        self.sequences[slot.index, :, :steps] = window.sequence
        self.draws[slot.index, window.start : steps] = window.draws
        prompt = self.sequences[slot.index : slot.index + 1, :, : window.start]  # [1, K, start]
        row, logits = slot.rows.start, []
        for group in window.conditions:
            cross = self.lm.cross_keys_values(group)
            self._take_in(row, group, cross)
            out = self.lm(prompt, group, cross, self.cache, row)  # [R, start, dim]
            logits.append(self.lm.logits(out[:, -1]))  # [R, K, card]
            row += group.rows
        self._sample([slot], torch.cat(logits))

    @abstractmethod
    def step(self) -> None:
        """Generates one more token of every codebook of every window that is not done."""

    def leave(self, slot: Slot) -> Tensor:
        """Frees a window's rows and gives its sequence, int64 `[K, S]`."""
        self.slots.remove(slot)
        self._free(slot)
        return self.sequence_of(slot).clone()

    def _sample(self, slots: Sequence[Slot], logits: Tensor) -> None:
        """Writes the next token of each slot, from the logits `[N, K, card]` of all their rows first, in order."""
        device = self.lm.device
        conditional, wav_only, null, row = [], [], [], 0
        for slot in slots:
            conditional.append(row)
            wav_only.append(row + 1 if slot.window.rows == 3 else row)
            null.append(row + slot.window.rows - 1)
            row += slot.window.rows
        coef = torch.tensor([[[float(slot.window.guidance.coef)]] for slot in slots], device=device)  # [B, 1, 1]
        beta = torch.tensor([[[float(slot.window.guidance.beta)]] for slot in slots], device=device)  # [B, 1, 1]
        guided = guide(logits[conditional], logits[wav_only], logits[null], coef, beta)  # [B, K, card]
        index = torch.tensor([slot.index for slot in slots], device=device)  # [B]
        self.diverged[index] |= not_finite(guided)
        step = torch.tensor([slot.step + 1 for slot in slots], device=device)  # [B]
        samplings = [slot.window.sampling for slot in slots]
        tokens = sample(guided, samplings, self.draws[index, step])  # [B, K]
        known = self.sequences[index, :, step]  # [B, K]
        self.sequences[index, :, step] = torch.where(known == UNKNOWN, tokens, known)
        for slot in slots:
            slot.step += 1

    def _free(self, slot: Slot) -> None:
        for row in slot.rows:
            self._free_rows[row] = True

    def _free_index(self) -> int:
        used = {slot.index for slot in self.slots}
        free = next((i for i in range(len(self.sequences)) if i not in used), None)
        if free is None:
            raise MemoryError(f"all {len(self.sequences)} places for requests are taken")
        return free

    def _claim(self, rows: int) -> range:
        first = self._gap(rows)
        if first is None:
            raise MemoryError(f"no {rows} rows side by side are free")
        for row in range(first, first + rows):
            self._free_rows[row] = False
        return range(first, first + rows)

    def _gap(self, rows: int) -> int | None:
        """The first of so many free rows side by side."""
        starts = range(len(self._free_rows) - rows + 1)
        return next((first for first in starts if all(self._free_rows[first : first + rows])), None)


def not_finite(guided: Tensor) -> Tensor:
    """Where guided logits float32 `[B, K, card]` hold anything but numbers: int32 `[B]`, 1 or 0.

    Guidance leaves no NaN and no infinity of any row out, and neither does their sum.
    """
    return (~guided.sum(dim=(1, 2)).isfinite()).int()


def sample(logits: Tensor, samplings: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """Draws one token for each request and codebook, each by its own settings.

    Args:
        logits: guided logits, float32 `[B, K, card]`.
        samplings: B settings.
        uniform: `[B, K]` in [0, 1).

    Returns:
        int64 `[B, K]`.
    """
    likeliest = logits.argmax(dim=-1)  # [B, K]
    if all(sampling.greedy for sampling in samplings):
        return likeliest
    device, card = logits.device, logits.shape[-1]
    greedy = torch.tensor([sampling.greedy for sampling in samplings], device=device)  # [B]
    temperature = torch.tensor([1.0 if s.greedy else float(s.temperature) for s in samplings], device=device)  # [B]
    weights = (logits / temperature[:, None, None]).softmax(dim=-1)  # [B, K, card]
    keep = torch.ones_like(weights, dtype=torch.bool)
    top_k = [min(s.top_k, card) if s.top_k > 0 and s.top_p <= 0.0 else card for s in samplings]
    if min(top_k) < card:
        largest_k = max(k for k in top_k if k < card)
        limited = torch.tensor([k < card for k in top_k], device=device)[:, None, None]
        k = torch.tensor([min(k, largest_k) for k in top_k], device=device)
        keep &= ~limited | keep_top_k(weights, k, largest_k)
    if any(s.top_p > 0.0 for s in samplings):
        limited = torch.tensor([s.top_p > 0.0 for s in samplings], device=device)[:, None, None]
        keep &= ~limited | keep_top_p(weights, torch.tensor([float(s.top_p) for s in samplings], device=device))
    return torch.where(greedy[:, None], likeliest, draw(weights * keep, uniform))
