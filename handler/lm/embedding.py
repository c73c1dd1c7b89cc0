"""Positions: sinusoidal and rotary embeddings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_XPOS_SMOOTHING = 0.4  # of xPos' decay (Sun et al. 2022)


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021), with the frequencies of the checkpoint.

    `xpos` adds the decay of xPos (Sun et al. 2022). `scale` (`positional_scale`) blends the rotation with the
    identity, as audiocraft does.
    """

    def __init__(self, head_dim: int, scale: float, xpos: bool) -> None:
        super().__init__()
        self.scale = scale
        self.frequencies: Tensor
        self.register_buffer("frequencies", torch.empty(head_dim // 2))
        self.xpos = _XPos(head_dim) if xpos else None

    def rotate(self, q: Tensor, k: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """q `[N, H, head_dim]` and k `[N, H_kv, head_dim]`, turned by their `positions` `[N]`."""
        angles = positions[:, None].float() * self.frequencies  # [N, head_dim / 2]
        decay = torch.ones_like(angles) if self.xpos is None else self.xpos(positions)
        return self._turn(q, angles, decay), self._turn(k, angles, 1.0 / decay)

    def _turn(self, x: Tensor, angles: Tensor, decay: Tensor) -> Tensor:
        rotation = torch.polar(decay, angles) * self.scale + (1.0 - self.scale)  # complex [N, head_dim / 2]
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))  # [N, H, head_dim / 2]
        return torch.view_as_real(pairs * rotation[:, None]).flatten(-2).to(x.dtype)

    @staticmethod
    def computed(head_dim: int, max_period: float, xpos: bool) -> dict[str, Tensor]:
        """The buffers as the configuration gives them, float32 `[head_dim / 2]` by name, as training begins with them.

        Of an export they are the same, rounded to its dtype.
        """
        even, half = torch.arange(0, head_dim, 2).float(), torch.arange(head_dim // 2).float()
        buffers = {"frequencies": 1.0 / (max_period ** (even / head_dim))}
        if xpos:
            buffers["xpos.decay_rates"] = (half / (head_dim // 2) + _XPOS_SMOOTHING) / (1.0 + _XPOS_SMOOTHING)
        return buffers


class _XPos(nn.Module):
    """The exponential decay of xPos; its base of 512 positions is the reference's."""

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.decay_rates: Tensor
        self.register_buffer("decay_rates", torch.empty(head_dim // 2))

    def forward(self, positions: Tensor) -> Tensor:
        return self.decay_rates ** (positions[:, None].float() / 512)  # [N, head_dim / 2]


def sinusoidal_embedding(positions: Tensor, dim: int, max_period: float = 10_000) -> Tensor:
    """Sines and cosines of the positions, float32 `[..., dim]`, cosines first.

    The exponent of the period is j / (dim/2 - 1), so that the last frequency is exactly 1 / max_period.
    """
    half = dim // 2
    exponent = torch.arange(half, device=positions.device, dtype=torch.float32) / (half - 1)
    period = torch.full([], max_period, device=positions.device, dtype=torch.float32) ** exponent
    phase = positions[..., None].float() / period
    return torch.cat([phase.cos(), phase.sin()], dim=-1)
