"""Hugging Face folders against transformers' own EncodecModel with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import EncodecConfig, EncodecModel

from handler.compression import load_huggingface_encodec

SMALL: dict[str, Any] = {
    "sampling_rate": 600,
    "hidden_size": 8,
    "codebook_dim": 8,
    "codebook_size": 32,
    "num_filters": 4,
    "upsampling_ratios": [3, 2],
    "target_bandwidths": [0.5, 2.0],
    "use_causal_conv": False,
}

VARIANTS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "causal": {"use_causal_conv": True},
    "causal_trimmed_both": {"use_causal_conv": True, "trim_right_ratio": 0.5},
    "group_norm": {"norm_type": "time_group_norm"},
    "identity_skip": {"use_conv_shortcut": False},
    "normalize": {"normalize": True},
    "stereo_normalize": {"normalize": True, "audio_channels": 2},
    "layers": {"num_residual_layers": 2, "dilation_growth_rate": 3, "num_lstm_layers": 1, "compress": 4},
    "kernels": {"kernel_size": 5, "last_kernel_size": 3, "residual_kernel_size": 5},
    "constant": {"pad_mode": "constant"},
    "replicate": {"pad_mode": "replicate"},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_a_folder_codes_and_decodes_as_transformers_does(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    theirs = EncodecModel(EncodecConfig(**{**SMALL, **VARIANTS[name]})).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    for layer in theirs.quantizer.layers:
        layer.codebook.embed.normal_(std=0.3)
    theirs.save_pretrained(tmp_path)

    ours = load_huggingface_encodec(tmp_path)
    wav = torch.randn(2, ours.channels, 205)
    with torch.inference_mode():
        latent = theirs.encoder(wav)
        torch.testing.assert_close(ours.encoder(wav), latent, rtol=0, atol=2e-5)
        torch.testing.assert_close(ours.decoder(latent), theirs.decoder(latent), rtol=0, atol=5e-6)
        encoded = theirs.encode(wav, bandwidth=2.0)
        codes, scale = ours.encode(wav)
        assert codes.shape == (2, 4, 35)
        assert torch.equal(codes, encoded.audio_codes[0])
        decoded = theirs.decode(encoded.audio_codes, encoded.audio_scales)[0]
        torch.testing.assert_close(ours.decode(codes, scale), decoded, rtol=0, atol=5e-6)
