"""Convolutions that pad and trim so that lengths are whole multiples of the stride.

The numbers (`left`, `right`, `stride`, `span`) are plain attributes: whoever decodes chunk by chunk needs
them to know how much context to keep and to hold back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.linear import Linear

PAD_MODES = ("constant", "reflect", "replicate", "circular")


def pad(x: Tensor, left: int, right: int, mode: str) -> Tensor:
    """Pad time: `[B, C, T]` -> `[B, C, left + T + right]`.

    Reflecting an input no longer than the padding appends zeros, reflects, and cuts, as audiocraft does.

    Raises:
        ValueError: circular padding that is longer than the input.
    """
    if left == right == 0:
        return x
    length, widest = x.shape[-1], max(left, right)
    if mode == "reflect" and length <= widest:
        x = F.pad(x, (0, widest - length + 1))
        return F.pad(x, (left, right), mode)[..., : left + length + right]
    if mode == "circular" and length < widest:
        raise ValueError(f"circular padding of {widest} needs an input of that length, got {length}: too short")
    return F.pad(x, (left, right), mode)


class NormConv1d(nn.Module):
    """A convolution and the group norm after it (over channels and time, one group), if any.

    Weight norm and spectral norm are folded into the weight when it is loaded.
    """

    def __init__(self, conv: nn.Conv1d, group_norm: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.conv = conv
        self.norm = make_norm(conv.out_channels, group_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x))


class NormConvTranspose1d(nn.Module):
    """`NormConv1d` for a transposed convolution."""

    def __init__(self, convtr: nn.ConvTranspose1d, group_norm: Mapping[str, Any] | None) -> None:
        super().__init__()
        self.convtr = convtr
        self.norm = make_norm(convtr.out_channels, group_norm)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.convtr(x))


def make_norm(channels: int, group_norm: Mapping[str, Any] | None) -> nn.Module:
    return nn.Identity() if group_norm is None else nn.GroupNorm(1, channels, **group_norm)


class PaddedConv1d(nn.Module):
    """A convolution from `[B, in, T]` to `[B, out, ceil(T / stride)]`.

    Attributes:
        span: input samples one output sees.
        left, right: padding; `right` doesn't count what fills the last window.
        block: the samples of one row of `blocks`.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        causal: bool,
        pad_mode: str,
        group_norm: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        conv = nn.Conv1d(in_channels, out_channels, kernel_size, stride=stride, dilation=dilation)
        self.conv = NormConv1d(conv, group_norm)
        self.stride = stride
        self.span = (kernel_size - 1) * dilation + 1
        total = self.span - stride
        self.right = 0 if causal else total // 2
        self.left = total - self.right
        self.pad_mode = pad_mode
        self.block = max(8, self.span - 1)

    def forward(self, x: Tensor) -> Tensor:
        fill = -x.shape[-1] % self.stride
        return self.conv(pad(x, self.left, self.right + fill, self.pad_mode))  # [B, out, ceil(T / stride)]

    @cached_property
    def windows(self) -> Linear:
        """The same as a product: the inputs that an output sees `[N, kernel * in]`, earliest first -> `[N, out]`.

        It is made of the weights at its first use; they must not change or move any more. Only for a stride of 1 and
        without a norm.
        """
        conv = self.conv.conv
        return Linear(conv.weight.transpose(1, 2).flatten(1), conv.bias, conv.weight.device, conv.weight.dtype)

    @cached_property
    def blocks(self) -> Linear:
        """The same as a product, without the bias: what a block of inputs `[N, block * in]` adds to the outputs of
        its own block and to those of the block before it, `[N, 2 * block * out]`. An output is of the block in which
        the inputs that it sees begin.

        It is made of the weights at its first use; they must not change or move any more. Only for a stride of 1 and
        without a norm.
        """
        conv = self.conv.conv
        inputs = self.block * conv.in_channels
        impulses = torch.eye(2 * inputs).view(2 * inputs, 2 * self.block, -1)  # each in one of two blocks in a row
        answers = F.conv1d(impulses.mT, conv.weight, dilation=conv.dilation)[..., : self.block]  # of the first block
        weight = answers.mT.reshape(2, inputs, -1).mT.flatten(0, 1)  # [2 * block * out, block * in]
        return Linear(weight, None, weight.device, weight.dtype)


class TrimmedConvTranspose1d(nn.Module):
    """A transposed convolution from `[B, in, T]` to `[B, out, T * stride]`.

    Attributes:
        span: output samples one input reaches.
        left, right: output samples cut off.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int,
        causal: bool,
        trim_right_ratio: float,
        group_norm: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        convtr = nn.ConvTranspose1d(in_channels, out_channels, kernel_size, stride=stride)
        self.convtr = NormConvTranspose1d(convtr, group_norm)
        self.stride = stride
        self.span = kernel_size
        total = kernel_size - stride
        self.right = math.ceil(total * trim_right_ratio) if causal else total // 2
        self.left = total - self.right

    def forward(self, x: Tensor) -> Tensor:
        y = self.convtr(x)  # [B, out, T * stride + left + right]
        return y[..., self.left : y.shape[-1] - self.right]

    @cached_property
    def pairs(self) -> Linear:
        """The same as a product: an input and the one before it, `[N, 2 * in]`, earlier one first, make the `stride`
        outputs `[N, stride * out]` that the later one is the first to reach.

        It is made of the weights at its first use; they must not change or move any more. Only for a span of twice
        the stride and without a norm.
        """
        conv = self.convtr.convtr
        reach = conv.weight.unflatten(2, (2, self.stride))  # [in, out, own or next outputs, stride]
        weight = reach.flip(2).permute(3, 1, 2, 0).flatten(2).flatten(0, 1)  # [stride * out, 2 * in]
        bias = None if conv.bias is None else conv.bias.repeat(self.stride)
        return Linear(weight, bias, weight.device, weight.dtype)
