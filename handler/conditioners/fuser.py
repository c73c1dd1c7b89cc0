"""How conditions reach the language model: in front of the codes, by cross-attention, or added to them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from handler.errors import CheckpointError
from handler.lm.conditions import FusedConditions
from handler.lm.embedding import sinusoidal_embedding

METHODS = ("sum", "prepend", "cross", "input_interpolate")
_ADDING = ("sum", "input_interpolate")


@dataclass(frozen=True, slots=True)
class Condition:
    """What a conditioner makes of one input.

    Attributes:
        embedding: float32 `[1, L, dim]`; an absent text's is zeros, and so is its padding.
        is_null: whether the input was absent. Not every null condition is zero: that of a melody is not.
    """

    embedding: Tensor
    is_null: bool = False


class Fuser:
    """The `fuser` of the `xp.cfg`: which condition goes which way.

    Args:
        methods: for each of `sum`, `prepend`, `cross`, `input_interpolate` the names of its conditions.
        dim: of the language model.
        cross_pos_emb_scale: scale of the sinusoid added to the cross-attention source (`cross_attention_pos_emb`),
            or None where there is none.

    Raises:
        CheckpointError: if a condition is named twice.
    """

    def __init__(self, methods: Mapping[str, Sequence[str]], dim: int, cross_pos_emb_scale: float | None) -> None:
        self.dim = dim
        self.cross_pos_emb_scale = cross_pos_emb_scale
        self.method_of: dict[str, str] = {}
        for method in METHODS:
            for name in methods.get(method, ()):
                if name in self.method_of:
                    raise CheckpointError(f"fuser.{method}: the condition {name!r} is already fused by another way.")
                self.method_of[name] = method

    @property
    def adds(self) -> bool:
        """Whether conditions are added to the embedded codes."""
        return any(method in _ADDING for method in self.method_of.values())

    def fuse(self, rows: Sequence[Mapping[str, Condition]], steps: int) -> FusedConditions:
        """Fuses the conditions of rows whose prefixes have equal lengths.

        Each row maps the names to its conditions, in the order they are fused (text before audio). Each prepended
        condition goes in front of those before it. A `sum` or `input_interpolate` condition is added to all that is
        there when its turn comes, prefix included.

        `input_interpolate` spreads a condition over the whole sequence of `steps` steps, as in training; audiocraft's
        step-by-step generation stretches it over one step at a time, and so only ever uses its first vector.

        Args:
            rows: R mappings.
            steps: S, the length of the sequence the rows will run over.
        """
        prefix = torch.zeros(len(rows), 0, self.dim)  # [R, P, dim]
        additive = torch.zeros(len(rows), steps, self.dim)  # [R, S, dim]
        crosses: list[list[Condition]] = [[] for _ in rows]
        for name in rows[0]:
            conditions = [row[name] for row in rows]
            method = self.method_of[name]
            if method == "cross":
                for cross, condition in zip(crosses, conditions, strict=True):
                    cross.append(condition)
                continue
            embedding = torch.cat([condition.embedding for condition in conditions])  # [R, L, dim]
            if method == "prepend":
                prefix = torch.cat([embedding, prefix], dim=1)
                continue
            length = prefix.shape[1] + steps
            if method == "input_interpolate":
                embedding = F.interpolate(embedding.mT, size=length).mT  # [R, P + S, dim]
            elif embedding.shape[1] not in (1, length):
                raise CheckpointError(
                    f"fuser.sum: the condition {name!r} has {embedding.shape[1]} vectors, and only a condition of "
                    "one vector can be summed with every step. Use prepend, cross or input_interpolate for it."
                )
            embedding = embedding.expand(-1, length, -1)
            prefix = prefix + embedding[:, : prefix.shape[1]]
            additive = additive + embedding[:, -steps:]
        adds = any(self.method_of[name] in _ADDING for name in rows[0])
        return FusedConditions(len(rows), prefix, self._cross(crosses), additive if adds else None)

    def _cross(self, crosses: Sequence[Sequence[Condition]]) -> Tensor | None:
        """The cross-attention source of the leading rows that are not null."""
        if self.cross_pos_emb_scale is None:
            # Zero vectors stay zero, so what follows the last row with anything in it needs no cross-attention.
            crosses = [row for row in crosses if any(condition.embedding.any() for condition in row)]
        if not crosses or not crosses[0]:
            return None
        source = torch.stack([torch.cat([condition.embedding[0] for condition in row]) for row in crosses])
        if self.cross_pos_emb_scale is not None:
            positions = torch.arange(source.shape[1])
            source = source + self.cross_pos_emb_scale * sinusoidal_embedding(positions, self.dim)
        return source  # [C, L, dim]
