"""Codes: the quantizer, EnCodec's encode and decode, and interleaved stereo."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from handler.compression import (
    EncodecConfig,
    EncodecModel,
    InterleavedStereo,
    ResidualVectorQuantizer,
    SEANetConfig,
    quantizer,
)
from handler.errors import CheckpointError


def make_encodec(channels: int = 1, renormalize: bool = False) -> EncodecModel:
    torch.manual_seed(0)
    network = SEANetConfig(channels=channels, dimension=6, n_filters=4, n_residual_layers=1, ratios=(3, 2))
    model = EncodecModel(EncodecConfig(network, network, 4, 16, 60, 10.0, renormalize))
    for embed in model.quantizer.codebooks:
        embed.normal_(std=0.2)
    return model


def noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(7))


def test_each_codebook_takes_the_nearest_row_of_what_is_left() -> None:
    model = make_encodec()
    latent = noise(2, 6, 9)
    codes = model.quantizer.encode(latent, 4)
    assert codes.shape == (2, 4, 9)
    assert codes.dtype == torch.int64
    left = latent.transpose(1, 2)
    for k, embed in enumerate(model.quantizer.codebooks):
        assert torch.equal(codes[:, k], torch.cdist(left, embed).argmin(-1))
        left = left - embed[codes[:, k]]
    torch.testing.assert_close(model.quantizer.decode(codes), latent - left.transpose(1, 2))


def test_long_audio_is_quantized_in_pieces_to_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    rvq = make_encodec().quantizer
    latent = noise(3, 6, 50)
    whole = rvq.encode(latent, 4)
    monkeypatch.setattr(quantizer, "MAX_DISTANCES", 16 * 7)
    assert torch.equal(rvq.encode(latent, 4), whole)


def test_fewer_codebooks_give_the_first_ones() -> None:
    model = make_encodec()
    wav = noise(2, 1, 60)
    codes, scale = model.encode(wav)
    assert scale is None
    model.set_num_codebooks(2)
    assert model.num_codebooks == 2
    assert model.total_codebooks == 4
    assert torch.equal(model.encode(wav)[0], codes[:, :2])
    assert model.decode(codes[:, :1]).shape == (2, 1, 60)


def test_the_last_frame_is_filled_up_and_the_audio_not_cut() -> None:
    model = make_encodec()
    codes, _ = model.encode(noise(1, 1, 61))
    assert codes.shape == (1, 4, 11)
    assert model.decode(codes).shape == (1, 1, 66)
    assert model.decode(codes.int()).dtype == torch.float32


def test_renormalize_takes_the_volume_out_and_puts_it_back() -> None:
    plain, model = make_encodec(channels=2), make_encodec(channels=2, renormalize=True)
    wav = noise(3, 2, 60) * torch.tensor([0.01, 1.0, 30.0])[:, None, None]
    codes, scale = model.encode(wav)
    assert scale is not None
    volume = wav.mean(1).square().mean(1).sqrt() + 1e-8
    torch.testing.assert_close(scale, volume[:, None])
    assert torch.equal(codes, plain.encode(wav / scale[:, :, None])[0])
    torch.testing.assert_close(model.decode(codes, scale), plain.decode(codes) * volume[:, None, None])
    assert torch.equal(model.decode(codes), plain.decode(codes))


def test_silence_can_be_renormalized() -> None:
    codes, scale = make_encodec(renormalize=True).encode(torch.zeros(1, 1, 60))
    assert scale is not None
    assert scale.item() == pytest.approx(1e-8)
    assert codes.shape == (1, 4, 10)


def test_inference_mode_and_no_gradients() -> None:
    model = make_encodec()
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.inference_mode():
        codes, _ = model.encode(noise(1, 1, 60))
        assert torch.isfinite(model.decode(codes)).all()


@pytest.mark.parametrize(
    ("wav", "message"),
    [
        (torch.zeros(1, 60), r"\[batch, 1, samples\].*got \[1, 60\]"),
        (torch.zeros(1, 2, 60), r"\[batch, 1, samples\].*got \[1, 2, 60\]"),
        (torch.zeros(1, 1, 0), "at least one sample"),
        (torch.zeros(1, 1, 60, dtype=torch.float64), "float32, got torch.float64"),
    ],
)
def test_wrong_audio_is_named(wav: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encodec().encode(wav)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(4, 10, dtype=torch.long), r"\[batch, codebooks, frames\].*got \[4, 10\]"),
        (torch.zeros(1, 5, 10, dtype=torch.long), "1 to 4 codebooks"),
        (torch.zeros(1, 4, 0, dtype=torch.long), "at least one frame"),
        (torch.zeros(1, 4, 10), "integers, got torch.float32"),
        (torch.full((1, 4, 10), 16), r"\[0, 16\), got 16 to 16"),
        (torch.full((1, 4, 10), -1), r"\[0, 16\), got -1 to -1"),
    ],
)
def test_wrong_codes_are_named(codes: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_encodec().decode(codes)


def test_wrong_scales_are_named() -> None:
    codes = torch.zeros(2, 4, 10, dtype=torch.long)
    with pytest.raises(ValueError, match="takes no scale"):
        make_encodec().decode(codes, torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"scale must have shape \[2, 1\], got \[1, 1\]"):
        make_encodec(renormalize=True).decode(codes, torch.ones(1, 1))
    with pytest.raises(ValueError, match=r"scale must have shape \[2, 2\], got \[2, 1\]"):
        InterleavedStereo(make_encodec(renormalize=True)).decode(codes, torch.ones(2, 1))


@pytest.mark.parametrize("n", [0, 5, -1])
def test_the_number_of_codebooks_has_named_bounds(n: int) -> None:
    with pytest.raises(ValueError, match=f"from 1 to 4, got {n}"):
        make_encodec().set_num_codebooks(n)


def test_stereo_codes_alternate_between_the_channels() -> None:
    mono = make_encodec()
    stereo = InterleavedStereo(mono)
    assert (stereo.channels, stereo.num_codebooks, stereo.total_codebooks) == (2, 8, 8)
    assert (stereo.frame_rate, stereo.hop_length, stereo.sample_rate, stereo.cardinality) == (10.0, 6, 60, 16)
    wav = noise(3, 2, 60)
    codes, scale = stereo.encode(wav)
    assert scale is None
    assert codes.shape == (3, 8, 10)
    assert torch.equal(codes[:, 0::2], mono.encode(wav[:, :1])[0])
    assert torch.equal(codes[:, 1::2], mono.encode(wav[:, 1:])[0])
    audio = stereo.decode(codes)
    assert audio.shape == (3, 2, 60)
    for channel in (0, 1):
        expected = mono.decode(codes[:, channel::2])
        torch.testing.assert_close(audio[:, channel : channel + 1], expected, rtol=0, atol=1e-6)


def test_stereo_codes_per_timestep_alternate_in_time() -> None:
    mono = make_encodec()
    stereo = InterleavedStereo(mono, per_timestep=True)
    assert (stereo.num_codebooks, stereo.total_codebooks) == (4, 4)
    assert (stereo.frame_rate, stereo.hop_length) == (20.0, 3)
    wav = noise(3, 2, 60)
    codes, _ = stereo.encode(wav)
    assert codes.shape == (3, 4, 20)
    assert torch.equal(codes[:, :, 0::2], mono.encode(wav[:, :1])[0])
    assert torch.equal(codes[:, :, 1::2], mono.encode(wav[:, 1:])[0])
    interleaved = InterleavedStereo(mono)
    assert torch.equal(stereo.decode(codes), interleaved.decode(interleaved.encode(wav)[0]))
    assert stereo.decode(codes).shape[-1] == codes.shape[-1] * stereo.hop_length


@pytest.mark.parametrize("per_timestep", [False, True])
def test_each_stereo_channel_has_its_own_scale(per_timestep: bool) -> None:
    mono = make_encodec(renormalize=True)
    stereo = InterleavedStereo(mono, per_timestep)
    wav = noise(2, 2, 60) * torch.tensor([1.0, 0.1])[:, None]
    codes, scale = stereo.encode(wav)
    assert scale is not None
    assert scale.shape == (2, 2)
    torch.testing.assert_close(scale, wav.square().mean(2).sqrt() + 1e-8)
    right = codes[:, :, 1::2] if per_timestep else codes[:, 1::2]
    torch.testing.assert_close(stereo.decode(codes, scale)[:, 1:], mono.decode(right, scale[:, 1:]))


def test_stereo_codebooks_are_set_in_pairs() -> None:
    stereo = InterleavedStereo(make_encodec())
    stereo.set_num_codebooks(6)
    assert stereo.num_codebooks == 6
    assert stereo.encode(noise(1, 2, 60))[0].shape == (1, 6, 10)
    for n in (0, 3, 10):
        with pytest.raises(ValueError, match=f"from 2 to 8 and a multiple of 2, one per channel, got {n}"):
            stereo.set_num_codebooks(n)
    stereo = InterleavedStereo(make_encodec(), per_timestep=True)
    stereo.set_num_codebooks(3)
    assert stereo.encode(noise(1, 2, 60))[0].shape == (1, 3, 20)
    with pytest.raises(ValueError, match="from 1 to 4, got 5"):
        stereo.set_num_codebooks(5)


def test_halves_of_stereo_codes_are_refused() -> None:
    with pytest.raises(ValueError, match="pairs of codebooks, got 3"):
        InterleavedStereo(make_encodec()).decode(torch.zeros(1, 3, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="pairs of frames, got 5"):
        InterleavedStereo(make_encodec(), per_timestep=True).decode(torch.zeros(1, 4, 5, dtype=torch.long))
    with pytest.raises(ValueError, match=r"\[batch, 2, samples\]"):
        InterleavedStereo(make_encodec()).encode(torch.zeros(1, 1, 60))


def test_stereo_counts_the_codebooks_in_use() -> None:
    mono = make_encodec()
    mono.set_num_codebooks(3)
    stereo = InterleavedStereo(mono)
    assert (stereo.num_codebooks, stereo.total_codebooks) == (6, 8)


def test_stereo_needs_a_mono_model_of_an_even_hop() -> None:
    with pytest.raises(CheckpointError, match=r"interleave_stereo_codebooks\.use needs a mono .* has 2 channels"):
        InterleavedStereo(make_encodec(channels=2))
    mono = make_encodec()
    mono.hop_length = 5
    with pytest.raises(CheckpointError, match=r"per_timestep needs a compression model of an even hop length"):
        InterleavedStereo(mono, per_timestep=True)


def test_the_quantizer_is_usable_by_itself() -> None:
    rvq = ResidualVectorQuantizer(3, 2, 5)
    for embed in rvq.codebooks:
        embed.data.normal_()
    assert rvq.decode(rvq.encode(noise(1, 3, 4), 1)).shape == (1, 3, 4)
