"""An LSTM that goes on where it stopped."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

State = tuple[Tensor, Tensor]
"""Hidden and cell state, each `[layers, B, C]`."""

Packed = list[tuple[Tensor, Tensor, Tensor, Tensor]]
"""Of each layer the prepacked weights and the biases, of the input and of the hidden state."""

_LSTM_MODE = 2


class ResumableLSTM:
    """An LSTM over the next steps of a sequence, from the state that the steps before them left.

    On a CPU its weights are prepacked for oneDNN. `nn.LSTM` packs them anew in every call, which takes as long as the
    25 steps of half a second of audio do. The outputs are the same to the last bit.

    Args:
        lstm: one direction, the sequence first; its weights must not change or move any more.
    """

    def __init__(self, lstm: nn.LSTM) -> None:
        self._lstm = lstm
        weight = lstm.weight_ih_l0
        on_cpu = weight.device.type == "cpu" and weight.dtype == torch.float32
        self._packed = _pack(lstm) if on_cpu and _CAN_PREPACK else None

    def __call__(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        """Steps `[T, B, C]` and the state before them, None at the start -> outputs `[T, B, C]`, the state after."""
        if self._packed is None:
            return self._lstm(x, state)
        if state is None:
            zeros = x.new_zeros(len(self._packed), x.shape[1], x.shape[2])
            state = zeros, zeros
        # Row by row: for two rows at once oneDNN takes three times as long as for one.
        rows = zip(x.split(1, 1), state[0].split(1, 1), state[1].split(1, 1), strict=True)
        y, hidden, cell = zip(*(_run(self._packed, *row) for row in rows), strict=True)
        return torch.cat(y, 1), (torch.cat(hidden, 1), torch.cat(cell, 1))


def _pack(lstm: nn.LSTM) -> Packed:
    packed: Packed = []
    for layer in range(lstm.num_layers):
        w_ih, w_hh, b_ih, b_hh = (
            getattr(lstm, f"{name}_l{layer}").detach() for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        )
        weights = torch.ops.mkldnn._reorder_mkldnn_rnn_layer_weight(w_ih, w_hh, lstm.hidden_size, False, True, False)
        packed.append((*weights, b_ih, b_hh))
    return packed


def _run(packed: Packed, x: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One row: steps `[T, 1, C]` and its state -> outputs `[T, 1, C]`, hidden and cell state."""
    after: list[State] = []
    for weights, h, c in zip(packed, hidden.split(1), cell.split(1), strict=True):
        # Not reversed, not packed, one layer with biases, one direction, the sequence first, for inference.
        x, h, c, _ = torch.ops.aten.mkldnn_rnn_layer(
            x.contiguous(),
            *weights,
            h.contiguous(),
            c.contiguous(),
            False,
            [],
            _LSTM_MODE,
            h.shape[-1],
            1,
            True,
            False,
            False,
            False,
        )
        after.append((h, c))
    hidden, cell = map(torch.cat, zip(*after, strict=True))
    return x, hidden, cell


def can_prepack() -> bool:
    """Whether this torch has oneDNN's LSTM with prepacked weights, and it gives the right output.

    The operators are private, so they are tried once on a small LSTM instead of trusted.
    """
    with torch.no_grad():
        lstm = nn.LSTM(4, 4, 2)
        for parameter in lstm.parameters():
            parameter.copy_(torch.linspace(-1, 1, parameter.numel()).view_as(parameter))
        x, state = torch.linspace(-1, 1, 12).view(3, 1, 4), torch.linspace(-1, 1, 8).view(2, 1, 4)
        expected, (hidden, cell) = lstm(x, (state, state))
        try:
            actual = _run(_pack(lstm), x, state, state)
        except (AttributeError, RuntimeError):
            return False
    return all(map(torch.allclose, actual, (expected, hidden, cell)))


_CAN_PREPACK = can_prepack()
if not _CAN_PREPACK:
    logger.warning(
        "oneDNN's LSTM with prepacked weights is missing from torch %s: streaming audio on a CPU takes longer.",
        torch.__version__,
    )
