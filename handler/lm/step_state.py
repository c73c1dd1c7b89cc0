"""What a decode step at fixed addresses reads and writes, on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from handler.lm.attention import CrossKV, KVCache
from handler.lm.conditions import FusedConditions
from handler.lm.decode_attention import CrossCache
from handler.lm.decoder import Slot


class RequestSettings:
    """How each request is sampled and how far it is; the last place is of nobody, and stays at its step 0.

    Attributes:
        step, last_step: int64 `[B]`, the newest step that holds a token, and the last there will be.
        coef, beta, temperature, top_p: float32 `[B]`.
        top_k: int64 `[B]`, all codes where it is off.
        greedy: bool `[B]`.
        diverged: int32 `[B]`, 1 where logits have not been finite; see `Decoder`.
    """

    def __init__(self, requests: int, card: int, device: torch.device) -> None:
        self.card = card
        self.step, self.last_step = (torch.zeros(requests, dtype=torch.long, device=device) for _ in range(2))
        self.coef, self.beta, self.temperature = (torch.ones(requests, device=device) for _ in range(3))
        self.top_p = torch.zeros(requests, device=device)
        self.top_k = torch.full((requests,), card, device=device)
        self.greedy = torch.ones(requests, dtype=torch.bool, device=device)
        self.diverged = torch.zeros(requests, dtype=torch.int32, device=device)

    def write(self, slot: Slot) -> None:
        """Takes in a window that has just joined."""
        guidance, sampling, i = slot.window.guidance, slot.window.sampling, slot.index
        limited = 0 < sampling.top_k < self.card and sampling.top_p <= 0.0
        self.step[i], self.last_step[i] = slot.step, slot.window.sequence.shape[1] - 1
        self.coef[i], self.beta[i] = float(guidance.coef), float(guidance.beta)
        self.temperature[i] = 1.0 if sampling.greedy else float(sampling.temperature)
        self.top_k[i], self.top_p[i] = sampling.top_k if limited else self.card, float(sampling.top_p)
        self.greedy[i] = sampling.greedy


class Plan:
    """Which rows and requests take part in a step.

    Attributes:
        rows, request_of: int64 `[rows]`, for each vector its row of the cache and its request.
        requests: int64 `[B]`, those to sample; no more than `rows` can be.
        places: int64 `[3, B]`, the vectors of their conditional, wav-only and null rows.
    """

    def __init__(self, rows: int, requests: int, device: torch.device) -> None:
        self._nobody = requests
        requests = min(rows, requests)
        self._all = torch.zeros(2 * rows + 4 * requests, dtype=torch.long, device=device)
        self.rows, self.request_of, self.requests, places = self._all.split([rows, rows, requests, 3 * requests])
        self.places = places.view(3, requests)
        self.write([])

    def write(self, slots: Sequence[Slot]) -> None:
        """Lets the rows of these windows take part, in this order.

        The places behind them are filled with a row of none of them and the request of nobody. There is such a row
        wherever one is needed, as then not every row takes part.
        """
        rows = [row for slot in slots for row in slot.rows]
        request_of = [slot.index for slot in slots for _ in slot.rows]
        requests = [slot.index for slot in slots]
        conditional, wav_only, null, first = [], [], [], 0
        for slot in slots:
            conditional.append(first)
            wav_only.append(first + 1 if len(slot.rows) == 3 else first)
            null.append(first + len(slot.rows) - 1)
            first += len(slot.rows)
        idle_row = next((row for row in range(len(self.rows)) if row not in rows), 0)
        numbers = [
            *_filled(rows, len(self.rows), idle_row),
            *_filled(request_of, len(self.rows), self._nobody),
            *_filled(requests, len(self.requests), self._nobody),
        ]
        for places in (conditional, wav_only, null):
            numbers += _filled(places, len(self.requests), 0)
        self._all.copy_(torch.tensor(numbers))


@dataclass(frozen=True, slots=True)
class StepState:
    """All tensors of the step; each is claimed once and written in place.

    Attributes:
        sequences: int64 `[requests + 1, K, S]`; the last is of nobody and holds code 0.
        draws: float32 `[requests + 1, S, K]`, the uniform numbers of each token.
        cache: keys and values of the past.
        offsets: int64 `[rows]`, positions before each row's step 0.
        cross: keys and values of the conditions, for models with cross-attention.
        additive: `[rows, S, dim]`, added to the embedded codes, for models that do.
        settings, plan: of the requests, and of the step.
    """

    sequences: Tensor
    draws: Tensor
    cache: KVCache
    offsets: Tensor
    cross: CrossCache | None
    additive: Tensor | None
    settings: RequestSettings
    plan: Plan

    def write(self, first_row: int, group: FusedConditions, cross: CrossKV | None) -> None:
        """Takes in the conditions of some rows that have just joined."""
        rows = slice(first_row, first_row + group.rows)
        self.offsets[rows] = group.prefix.shape[1]
        if self.additive is not None and group.additive is not None:
            self.additive[rows, : group.additive.shape[1]] = group.additive.to(self.additive)
        if self.cross is not None:
            self.cross.lengths[rows] = 0
            if cross is not None:
                self.cross.write(first_row, cross)

    def clear(self, slot: Slot) -> None:
        """Makes the rows of a window that leaves cheap to read, as they may fill places now."""
        rows = slice(slot.rows.start, slot.rows.stop)
        self.offsets[rows] = 0
        if self.cross is not None:
            self.cross.lengths[rows] = 0


def _filled(numbers: list[int], length: int, filler: int) -> list[int]:
    return numbers + [filler] * (length - len(numbers))
