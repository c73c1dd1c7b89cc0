"""SEANet against a functional reference written from FORMAT's description, option by option."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from handler.compression.conv import PAD_MODES, PaddedConv1d, TrimmedConvTranspose1d, pad
from handler.compression.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder

SMALL: dict[str, Any] = {"dimension": 6, "n_filters": 4, "n_residual_layers": 1, "ratios": (3, 2)}


class Reference:
    """Walks a network's state dict layer by layer with torch's functional operators alone."""

    def __init__(self, module: nn.Module, config: SEANetConfig) -> None:
        self.state = module.state_dict()
        self.config = config
        self.index = 0

    def act(self, x: Tensor) -> Tensor:
        return getattr(nn, self.config.activation)(**self.config.activation_params)(x)

    def norm(self, x: Tensor, key: str) -> Tensor:
        if f"{key}.norm.weight" not in self.state:
            return x
        eps = self.config.norm_params.get("eps", 1e-5)
        mean, variance = x.mean((1, 2), keepdim=True), x.var((1, 2), keepdim=True, unbiased=False)
        weight, bias = self.state[f"{key}.norm.weight"], self.state[f"{key}.norm.bias"]
        return (x - mean) / (variance + eps).sqrt() * weight[:, None] + bias[:, None]

    def conv(self, x: Tensor, key: str, stride: int = 1, dilation: int = 1) -> Tensor:
        weight, bias = self.state[f"{key}.conv.conv.weight"], self.state[f"{key}.conv.conv.bias"]
        total = (weight.shape[2] - 1) * dilation + 1 - stride
        frames = math.ceil(x.shape[-1] / stride)
        extra = frames * stride - x.shape[-1]
        right = 0 if self.config.causal else total // 2
        mode = self.config.pad_mode
        if mode == "reflect" and x.shape[-1] <= max(total - right, right + extra):
            zeros = max(total - right, right + extra) - x.shape[-1] + 1
            x = F.pad(F.pad(x, (0, zeros)), (total - right, right + extra), mode)[..., :-zeros]
        else:
            x = F.pad(x, (total - right, right + extra), mode)
        return self.norm(F.conv1d(x, weight, bias, stride=stride, dilation=dilation), f"{key}.conv")

    def convtr(self, x: Tensor, key: str, ratio: int) -> Tensor:
        weight, bias = self.state[f"{key}.convtr.convtr.weight"], self.state[f"{key}.convtr.convtr.bias"]
        y = self.norm(F.conv_transpose1d(x, weight, bias, stride=ratio), f"{key}.convtr")
        causal = self.config.causal
        right = math.ceil(ratio * self.config.trim_right_ratio) if causal else ratio // 2
        return y[..., ratio - right : y.shape[-1] - right]

    def residual(self, x: Tensor, key: str, dilation: int) -> Tensor:
        y = self.conv(self.act(x), f"{key}.block.1", dilation=dilation)
        y = self.conv(self.act(y), f"{key}.block.3")
        return y + (x if self.config.true_skip else self.conv(x, f"{key}.shortcut"))

    def lstm(self, x: Tensor, key: str) -> Tensor:
        steps = x.permute(2, 0, 1)
        y = steps
        for layer in range(self.config.lstm):
            parts = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
            w_ih, w_hh, b_ih, b_hh = (self.state[f"{key}.lstm.{part}_l{layer}"] for part in parts)
            h = c = y.new_zeros(y.shape[1:])
            outputs = []
            for step in y:
                i, f, g, o = (step @ w_ih.T + b_ih + h @ w_hh.T + b_hh).chunk(4, -1)
                c = f.sigmoid() * c + i.sigmoid() * g.tanh()
                h = o.sigmoid() * c.tanh()
                outputs.append(h)
            y = torch.stack(outputs)
        return (y + steps).permute(1, 2, 0)

    def key(self, skip: int = 0) -> str:
        self.index += 1 + skip
        return f"model.{self.index - 1}"

    def encode(self, x: Tensor) -> Tensor:
        x = self.conv(x, self.key())
        for ratio in reversed(self.config.ratios):
            for layer in range(self.config.n_residual_layers):
                x = self.residual(x, self.key(), self.config.dilation_base**layer)
            x = self.conv(self.act(x), self.key(1), stride=ratio)
        if self.config.lstm:
            x = self.lstm(x, self.key())
        return self.conv(self.act(x), self.key(1))

    def decode(self, x: Tensor) -> Tensor:
        x = self.conv(x, self.key())
        if self.config.lstm:
            x = self.lstm(x, self.key())
        for ratio in self.config.ratios:
            x = self.convtr(self.act(x), self.key(1), ratio)
            for layer in range(self.config.n_residual_layers):
                x = self.residual(x, self.key(), self.config.dilation_base**layer)
        x = self.conv(self.act(x), self.key(1))
        if self.config.final_activation:
            x = getattr(nn, self.config.final_activation)(**self.config.final_activation_params)(x)
        return x


def randomize(module: nn.Module) -> nn.Module:
    """Also the parameters that torch starts as ones and zeros."""
    generator = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return module.requires_grad_(False)


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stereo": {"channels": 2},
    "two_residual_layers": {"n_residual_layers": 2, "dilation_base": 3},
    "no_residual_layers": {"n_residual_layers": 0},
    "compress": {"compress": 4},
    "kernels": {"kernel_size": 5, "last_kernel_size": 3, "residual_kernel_size": 5},
    "even_kernels": {"kernel_size": 4, "last_kernel_size": 2, "residual_kernel_size": 2},
    "one_lstm_layer": {"lstm": 1},
    "two_lstm_layers": {"lstm": 2},
    "convolved_skip": {"true_skip": False},
    "causal": {"causal": True},
    "causal_trimmed_left": {"causal": True, "trim_right_ratio": 0.0},
    "causal_trimmed_both": {"causal": True, "trim_right_ratio": 0.4},
    "other_activation": {"activation": "LeakyReLU", "activation_params": {"negative_slope": 0.3}},
    "final_activation": {"final_activation": "Hardtanh", "final_activation_params": {"max_val": 0.1}},
    "group_norm": {"norm": "time_group_norm", "norm_params": {"eps": 1e-2}},
    "group_norm_convolved_skip": {"norm": "time_group_norm", "true_skip": False},
    **{f"padding_{mode}": {"pad_mode": mode} for mode in PAD_MODES},
    **{f"padding_{mode}_causal": {"pad_mode": mode, "causal": True} for mode in PAD_MODES},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_is_honoured(name: str) -> None:
    config = SEANetConfig(**{**SMALL, **OPTIONS[name]})
    encoder, decoder = randomize(SEANetEncoder(config)), randomize(SEANetDecoder(config))
    wav = torch.randn(2, config.channels, 100, generator=torch.Generator().manual_seed(1))
    latent = encoder(wav)
    assert latent.shape == (2, 6, 17)  # ceil(100 / 6)
    torch.testing.assert_close(latent, Reference(encoder, config).encode(wav), rtol=1e-4, atol=1e-5)
    audio = decoder(latent)
    assert audio.shape == (2, config.channels, 102)
    torch.testing.assert_close(audio, Reference(decoder, config).decode(latent), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["constant", "reflect", "replicate"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("samples", [1, 2, 5, 7])
def test_inputs_shorter_than_the_padding_are_coded(mode: str, causal: bool, samples: int) -> None:
    config = SEANetConfig(**SMALL, pad_mode=mode, causal=causal, lstm=1)
    encoder, decoder = randomize(SEANetEncoder(config)), randomize(SEANetDecoder(config))
    wav = torch.randn(1, 1, samples, generator=torch.Generator().manual_seed(2))
    latent = encoder(wav)
    assert latent.shape[-1] == -(-samples // 6)
    torch.testing.assert_close(latent, Reference(encoder, config).encode(wav), rtol=1e-4, atol=1e-5)
    audio = decoder(latent)
    assert audio.shape[-1] == latent.shape[-1] * 6
    torch.testing.assert_close(audio, Reference(decoder, config).decode(latent), rtol=1e-4, atol=1e-5)


def test_circular_padding_of_too_short_an_input_says_so() -> None:
    with pytest.raises(ValueError, match="circular padding of 4 needs an input of that length, got 3"):
        pad(torch.zeros(1, 1, 3), 4, 0, "circular")


def test_reflection_of_a_short_input_goes_over_appended_zeros() -> None:
    x = torch.tensor([[[1.0, 2.0]]])
    assert pad(x, 3, 3, "reflect").tolist() == [[[0.0, 0.0, 2.0, 1.0, 2.0, 0.0, 0.0, 0.0]]]


@pytest.mark.parametrize("blocks", range(5))
def test_the_outer_blocks_have_no_norm(blocks: int) -> None:
    config = SEANetConfig(**SMALL, norm="time_group_norm", disable_norm_outer_blocks=blocks, lstm=1, true_skip=False)
    encoder, decoder = SEANetEncoder(config), SEANetDecoder(config)

    # Model indices of each block, from the audio inwards.
    for network, members in (
        (encoder, [[0], [1, 3], [4, 6], [9]]),
        (decoder, [[9], [6, 7], [3, 4], [0]]),
    ):
        for depth, indices in enumerate(members):
            for index in indices:
                norms = [m for m in network.model[index].modules() if isinstance(m, nn.GroupNorm)]
                assert bool(norms) == (depth >= blocks)


def test_a_causal_network_never_looks_ahead() -> None:
    config = SEANetConfig(**SMALL, causal=True, pad_mode="constant", lstm=2)
    encoder, decoder = randomize(SEANetEncoder(config)), randomize(SEANetDecoder(config))
    wav = torch.randn(1, 1, 120, generator=torch.Generator().manual_seed(4))
    latent = encoder(wav)
    torch.testing.assert_close(encoder(wav[..., :60]), latent[..., :10], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(decoder(latent[..., :10]), decoder(latent)[..., :60], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_layers_tell_their_padding_and_trimming(causal: bool) -> None:
    conv = PaddedConv1d(1, 1, 3, dilation=4, causal=causal, pad_mode="constant")
    assert (conv.span, conv.stride) == (9, 1)
    assert (conv.left, conv.right) == ((8, 0) if causal else (4, 4))
    strided = PaddedConv1d(1, 1, 10, stride=5, causal=causal, pad_mode="constant")
    assert (strided.left, strided.right) == ((5, 0) if causal else (3, 2))
    convtr = TrimmedConvTranspose1d(1, 1, 10, stride=5, causal=causal, trim_right_ratio=0.5)
    assert (convtr.span, convtr.stride) == (10, 5)
    assert (convtr.left, convtr.right) == ((2, 3) if causal else (3, 2))
