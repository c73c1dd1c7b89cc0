"""Windows of a fixed size over a waveform that arrives in pieces."""

from __future__ import annotations

import torch
from torch import Tensor


class Windows:
    """Collects pieces `[C, m]` and gives windows `[C, size]`, one every `hop` samples, counted from the start.

    What is computed on them does not depend on how the waveform was cut into pieces, not even in the last bit, since
    every window is its own tensor of the same shape and alignment.
    """

    def __init__(self, size: int, hop: int) -> None:
        self.size, self.hop = size, hop
        self._held: Tensor | None = None

    def push(self, wav: Tensor) -> list[Tensor]:
        """Add a piece `[C, m]`; the windows it completes, oldest first."""
        held = wav if self._held is None else torch.cat([self._held, wav], dim=-1)
        count = max(0, (held.shape[-1] - self.size) // self.hop + 1)
        self._held = held[:, count * self.hop :].clone()
        return [held[:, i * self.hop : i * self.hop + self.size].clone() for i in range(count)]

    def rest(self) -> Tensor | None:
        """What has not filled a window `[C, <size]`, what the last window overlaps included; None before any push."""
        return self._held
