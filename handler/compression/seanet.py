"""SEANet, the convolutional encoder and decoder of EnCodec (arXiv:2210.13438, section 3.1)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from handler.compression.conv import PaddedConv1d, TrimmedConvTranspose1d
from handler.compression.lstm import ResumableLSTM

NORMS = ("none", "weight_norm", "spectral_norm", "time_group_norm")


@dataclass(frozen=True, slots=True)
class SEANetConfig:
    """One of the two networks, in the words of audiocraft's `seanet.*`; the defaults are audiocraft's.

    Attributes:
        channels: of the audio.
        dimension: of the latent.
        n_filters: channels next to the audio; they double with every ratio.
        n_residual_layers: residual blocks per ratio.
        ratios: upsampling factors in the decoder's order; the encoder takes them in reverse.
        activation, activation_params: a class of torch.nn and its arguments.
        final_activation, final_activation_params: the same, after the decoder.
        norm: one of NORMS; weight_norm and spectral_norm only say how weights are stored.
        norm_params: arguments of the group norm.
        kernel_size, last_kernel_size, residual_kernel_size: in samples of the layer at hand.
        dilation_base: residual block j dilates by dilation_base ** j.
        causal: convolutions see the past only.
        pad_mode: of torch.nn.functional.pad.
        true_skip: the residual shortcut is the identity, else a convolution.
        compress: a residual block's hidden channels are its channels divided by this.
        lstm: LSTM layers at the latent's end, 0 for none.
        disable_norm_outer_blocks: blocks without norm, counted from the audio's end.
        trim_right_ratio: share of a causal transposed convolution's surplus that is cut at the right.
    """

    channels: int = 1
    dimension: int = 128
    n_filters: int = 32
    n_residual_layers: int = 3
    ratios: tuple[int, ...] = (8, 5, 4, 2)
    activation: str = "ELU"
    activation_params: Mapping[str, Any] = field(default_factory=lambda: {"alpha": 1.0})
    final_activation: str | None = None
    final_activation_params: Mapping[str, Any] = field(default_factory=dict)
    norm: str = "none"
    norm_params: Mapping[str, Any] = field(default_factory=dict)
    kernel_size: int = 7
    last_kernel_size: int = 7
    residual_kernel_size: int = 3
    dilation_base: int = 2
    causal: bool = False
    pad_mode: str = "reflect"
    true_skip: bool = True
    compress: int = 2
    lstm: int = 0
    disable_norm_outer_blocks: int = 0
    trim_right_ratio: float = 1.0

    @property
    def hop_length(self) -> int:
        """Samples per frame."""
        return math.prod(self.ratios)

    @property
    def n_blocks(self) -> int:
        """The first convolution, one block per ratio, the last convolution."""
        return len(self.ratios) + 2

    def conv(
        self,
        block: int,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        dilation: int = 1,
    ) -> PaddedConv1d:
        """A convolution of the given block, blocks being counted from the audio's end."""
        return PaddedConv1d(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            dilation=dilation,
            causal=self.causal,
            pad_mode=self.pad_mode,
            group_norm=self._group_norm(block),
        )

    def convtr(self, block: int, in_channels: int, out_channels: int, ratio: int) -> TrimmedConvTranspose1d:
        """The transposed convolution of the given block, blocks being counted from the audio's end."""
        return TrimmedConvTranspose1d(
            in_channels,
            out_channels,
            2 * ratio,
            stride=ratio,
            causal=self.causal,
            trim_right_ratio=self.trim_right_ratio,
            group_norm=self._group_norm(block),
        )

    def act(self) -> nn.Module:
        return make_activation(self.activation, self.activation_params)

    def _group_norm(self, block: int) -> Mapping[str, Any] | None:
        disabled = self.norm != "time_group_norm" or block < self.disable_norm_outer_blocks
        return None if disabled else self.norm_params


def make_activation(name: str, params: Mapping[str, Any]) -> nn.Module:
    """An activation of torch.nn by its class name.

    Raises:
        AttributeError: there is none of that name.
        TypeError: it doesn't take these arguments.
    """
    if name not in nn.modules.activation.__all__:
        raise AttributeError(f"torch.nn has no activation {name!r}")
    activation: nn.Module = getattr(nn, name)(**params)
    return activation


class ResidualBlock(nn.Module):
    """`[B, C, T]` -> `[B, C, T]`: a dilated convolution to fewer channels, one back, and the shortcut."""

    def __init__(self, config: SEANetConfig, block: int, channels: int, dilation: int) -> None:
        super().__init__()
        hidden = channels // config.compress
        self.block = nn.Sequential(
            config.act(),
            config.conv(block, channels, hidden, config.residual_kernel_size, dilation=dilation),
            config.act(),
            config.conv(block, hidden, channels, 1),
        )
        self.shortcut = nn.Identity() if config.true_skip else config.conv(block, channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.block(x)


class SkipLSTM(nn.Module):
    """An LSTM over time, added to its input: `[B, C, T]` -> `[B, C, T]`."""

    def __init__(self, channels: int, layers: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(channels, channels, layers)

    def forward(self, x: Tensor) -> Tensor:
        steps = x.permute(2, 0, 1)  # [T, B, C]
        y, _ = self.lstm(steps)
        return (y + steps).permute(1, 2, 0)

    @cached_property
    def resumable(self) -> ResumableLSTM:
        """The LSTM alone, for a clip that comes in chunks; its weights must not change or move any more."""
        return ResumableLSTM(self.lstm)


class SEANetEncoder(nn.Module):
    """Audio `[B, channels, T]` -> latent `[B, dimension, ceil(T / hop_length)]`."""

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        width = config.n_filters
        model: list[nn.Module] = [config.conv(0, config.channels, width, config.kernel_size)]
        for block, ratio in enumerate(reversed(config.ratios), start=1):
            for layer in range(config.n_residual_layers):
                model.append(ResidualBlock(config, block, width, config.dilation_base**layer))
            model += [config.act(), config.conv(block, width, 2 * width, 2 * ratio, stride=ratio)]
            width *= 2
        if config.lstm:
            model.append(SkipLSTM(width, config.lstm))
        last = config.conv(config.n_blocks - 1, width, config.dimension, config.last_kernel_size)
        self.model = nn.Sequential(*model, config.act(), last)

    def forward(self, wav: Tensor) -> Tensor:
        return self.model(wav)


class SEANetDecoder(nn.Module):
    """Latent `[B, dimension, frames]` -> audio `[B, channels, frames * hop_length]`."""

    def __init__(self, config: SEANetConfig) -> None:
        super().__init__()
        width = config.n_filters * 2 ** len(config.ratios)
        model: list[nn.Module] = [config.conv(config.n_blocks - 1, config.dimension, width, config.kernel_size)]
        if config.lstm:
            model.append(SkipLSTM(width, config.lstm))
        for index, ratio in enumerate(config.ratios):
            block = len(config.ratios) - index
            model += [config.act(), config.convtr(block, width, width // 2, ratio)]
            width //= 2
            for layer in range(config.n_residual_layers):
                model.append(ResidualBlock(config, block, width, config.dilation_base**layer))
        model += [config.act(), config.conv(0, width, config.channels, config.last_kernel_size)]
        if config.final_activation is not None:
            model.append(make_activation(config.final_activation, config.final_activation_params))
        self.model = nn.Sequential(*model)

    def forward(self, latent: Tensor) -> Tensor:
        return self.model(latent)
