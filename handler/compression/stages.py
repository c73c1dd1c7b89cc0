"""SEANet's decoder in stages, each a layer that takes its input a chunk at a time.

Here time comes before the channels, `[B, T, C]`: a chunk is then one piece of memory, the outputs of a transposed
convolution are in order as they come, and oneDNN's convolutions are fastest.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handler.compression.conv import NormConv1d, NormConvTranspose1d, PaddedConv1d, TrimmedConvTranspose1d, pad
from handler.compression.lstm import State
from handler.compression.seanet import ResidualBlock, SEANetDecoder, SkipLSTM

# Activations whose output depends on the input at the same place alone.
POINTWISE = (
    nn.CELU,
    nn.ELU,
    nn.GELU,
    nn.Hardsigmoid,
    nn.Hardswish,
    nn.Hardtanh,
    nn.Identity,
    nn.LeakyReLU,
    nn.Mish,
    nn.ReLU,
    nn.ReLU6,
    nn.SELU,
    nn.Sigmoid,
    nn.SiLU,
    nn.Softplus,
    nn.Softsign,
    nn.Tanh,
)


class Stage(ABC):
    """A layer, and what it carries from one chunk of a clip to the next."""

    @abstractmethod
    def __call__(self, x: Tensor, last: bool) -> Tensor:
        """Take the next inputs and give the outputs that they settle.

        Args:
            x: `[B, t, in]`, t may be 0.
            last: no input comes after these, so that all outputs are settled.

        Returns:
            `[B, u, out]`, u may be 0.
        """

    @abstractmethod
    def inputs_for(self, outputs: int) -> int:
        """How many inputs, from the start of a clip, settle so many outputs when more are to come."""


@dataclass(slots=True)
class PointwiseStage(Stage):
    layer: nn.Module

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        return self.layer(x)

    def inputs_for(self, outputs: int) -> int:
        return outputs


@dataclass(slots=True)
class EluStage(Stage):
    """ELU with an alpha of 1, on a CPU in half the time of torch's own.

    Torch takes `expm1`, which is exact near 0 in relative terms too; here 1 is subtracted from a power of 2.
    """

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if x.device.type != "cpu":
            return F.elu(x)
        return x.clamp(max=0).mul_(1 / math.log(2)).exp2_().sub_(1).clamp_min_(x)

    def inputs_for(self, outputs: int) -> int:
        return outputs


@dataclass(slots=True)
class ConvStage(Stage):
    """A convolution of stride 1.

    Attributes:
        held: `[B, t, in]`, the inputs that outputs to come see.
        started: `held` began with the padding before the first input.
    """

    layer: PaddedConv1d
    held: Tensor | None = None
    started: bool = False

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        layer = self.layer
        if self.held is not None and self.held.shape[1]:
            x = torch.cat([self.held, x], 1)
        # A reflection is made of the inputs after the first. A clip too short to have them is padded in another way,
        # so until they are there nothing is known.
        enough = layer.left + 1 if layer.pad_mode == "reflect" else 1
        if last or self.started or x.shape[1] >= enough:
            left, right = 0 if self.started else layer.left, layer.right if last else 0
            x = pad(x.transpose(1, 2), left, right, layer.pad_mode).transpose(1, 2)
            self.started = True
        settled = x.shape[1] - (layer.span - 1) if self.started else 0
        if settled <= 0:
            self.held = x
            return x.new_empty(x.shape[0], 0, layer.conv.conv.out_channels)
        self.held = x[:, settled:].clone()
        return convolve(layer, x)

    def inputs_for(self, outputs: int) -> int:
        return outputs + self.layer.right


def convolve(layer: PaddedConv1d, x: Tensor) -> Tensor:
    """`[B, T, in]` -> `[B, T - span + 1, out]`."""
    conv = layer.conv.conv
    if x.device.type == "cpu" and conv.out_channels <= _FEW_CHANNELS:
        return _convolve_blocks(layer, x)
    if x.device.type == "cpu" and conv.weight.numel() > x.numel():
        # Laying the weights out for a convolution, which oneDNN does in each call, would take longer than the rest.
        windows = x.unfold(1, layer.span, 1)[..., :: conv.dilation[0]].mT  # [B, T - span + 1, kernel, in]
        return layer.windows(windows.reshape(-1, layer.windows.in_features)).unflatten(0, windows.shape[:2])
    image = x.transpose(1, 2).unsqueeze(2)  # [B, in, 1, T], the channels last in memory
    y = F.conv2d(image, conv.weight.unsqueeze(2), conv.bias, dilation=(1, conv.dilation[0]))
    return y.squeeze(2).transpose(1, 2)


_FEW_CHANNELS = 2
"""Up to here oneDNN's convolution takes several times as long as the product by blocks."""


def _convolve_blocks(layer: PaddedConv1d, x: Tensor) -> Tensor:
    conv, block = layer.conv.conv, layer.block
    outputs = x.shape[1] - layer.span + 1
    blocks = -(-outputs // block)
    x = F.pad(x, (0, 0, 0, (blocks + 1) * block - x.shape[1]))
    y = layer.blocks(x.reshape(-1, block * conv.in_channels))  # [B * (blocks + 1), 2 * block * out]
    own, later = y.view(x.shape[0], blocks + 1, 2, block, conv.out_channels).unbind(2)
    y = (own[:, :-1] + later[:, 1:]).flatten(1, 2)[:, :outputs]  # [B, outputs, out]
    return y if conv.bias is None else y.add_(conv.bias)


@dataclass(slots=True)
class TransposedStage(Stage):
    """A transposed convolution in which every input reaches `stride` outputs of its own and those of the next.

    Attributes:
        previous: `[B, 1, in]`, the last input.
    """

    layer: TrimmedConvTranspose1d
    previous: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        layer, silence = self.layer, x.new_zeros(x.shape[0], 1, x.shape[2])
        trim_left = layer.left if self.previous is None and x.shape[1] else 0
        x = torch.cat([silence if self.previous is None else self.previous, x, *([silence] if last else [])], 1)
        if x.shape[1] > 1:
            self.previous = x[:, -1:].clone()
        pairs = torch.cat([x[:, :-1], x[:, 1:]], 2)  # [B, t, 2 * in]
        y = layer.pairs(pairs.flatten(0, 1))  # [B * t, stride * out]
        y = y.view(x.shape[0], -1, layer.convtr.convtr.out_channels)  # [B, t * stride, out]
        return y[:, trim_left : y.shape[1] - (layer.right if last else 0)]

    def inputs_for(self, outputs: int) -> int:
        return -(-(outputs + self.layer.left) // self.layer.stride)


@dataclass(slots=True)
class LSTMStage(Stage):
    layer: SkipLSTM
    state: State | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        if not x.shape[1]:
            return x
        y, self.state = self.layer.resumable(x.transpose(0, 1), self.state)  # [t, B, C]
        return y.transpose(0, 1) + x

    def inputs_for(self, outputs: int) -> int:
        return outputs


@dataclass(slots=True)
class ResidualStage(Stage):
    """A residual block.

    Attributes:
        held: `[B, t, C]`, what the shortcut gave and the slower block has not answered yet.
    """

    block: list[Stage]
    shortcut: Stage
    held: Tensor | None = None

    def __call__(self, x: Tensor, last: bool) -> Tensor:
        skip = self.shortcut(x, last)
        if self.held is not None:
            skip = torch.cat([self.held, skip], 1)
        y = run(self.block, x, last)
        self.held = skip[:, y.shape[1] :].clone()
        return y.add_(skip[:, : y.shape[1]])

    def inputs_for(self, outputs: int) -> int:
        return inputs_for(self.block, outputs)


def decode_in_chunks(decoder: SEANetDecoder, latent: Tensor) -> Tensor:
    """`decoder(latent)`, up to rounding, in pieces that fit a CPU's caches: in half the time."""
    try:
        stages = make_stages(decoder)
    except NeedsWholeClipError:
        return decoder(latent)
    return run(stages, latent.transpose(1, 2), last=True).transpose(1, 2)


class NeedsWholeClipError(Exception):
    """A layer whose outputs depend on the whole clip: it has no stage."""


def make_stages(decoder: SEANetDecoder) -> list[Stage]:
    """The decoder's layers, in order, as stages at the start of a clip.

    Raises:
        NeedsWholeClipError: a layer is a group norm (over all of time), pads circularly (the start sees the end), or
            is an activation that mixes positions or overwrites what the shortcut beside it reads.
    """
    return [_make_stage(layer) for layer in decoder.model]


def _make_stage(layer: nn.Module) -> Stage:
    match layer:
        case PaddedConv1d(stride=1, conv=NormConv1d(norm=nn.Identity())) if layer.pad_mode != "circular":
            return ConvStage(layer)
        case TrimmedConvTranspose1d(convtr=NormConvTranspose1d(norm=nn.Identity())):
            return TransposedStage(layer)
        case SkipLSTM():
            return LSTMStage(layer)
        case ResidualBlock():
            return ResidualStage([_make_stage(part) for part in layer.block], _make_stage(layer.shortcut))
        case nn.ELU(alpha=1.0, inplace=False):
            return EluStage()
    if isinstance(layer, POINTWISE) and not getattr(layer, "inplace", False):
        return PointwiseStage(layer)
    raise NeedsWholeClipError(f"{layer} needs the whole clip")


CACHED_VALUES = 2**19
"""How many of a chunk's values a CPU's caches hold beside the weights; each stage makes up to twice as many of them."""


def run(stages: Sequence[Stage], x: Tensor, last: bool) -> Tensor:
    """One chunk through all stages, as `Stage.__call__`.

    On a CPU, a chunk that outgrows the caches on its way goes on in pieces, one after the other.
    """
    for index, stage in enumerate(stages):
        pieces = -(-x.numel() // CACHED_VALUES) if x.device.type == "cpu" else 1
        if pieces > 1 and x.shape[1] > 1:
            chunks = x.split(-(-x.shape[1] // pieces), 1)
            return torch.cat([run(stages[index:], c, last and c is chunks[-1]) for c in chunks], 1)
        x = stage(x, last)
    return x


def inputs_for(stages: Sequence[Stage], outputs: int) -> int:
    """As `Stage.inputs_for`, through all stages."""
    for stage in reversed(stages):
        outputs = stage.inputs_for(outputs)
    return outputs
