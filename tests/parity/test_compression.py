"""The compression models against recorded outputs of audiocraft, float32 on a CPU."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from handler.checkpoint import Checkpoint, read_checkpoint
from handler.compression import EncodecModel, InterleavedStereo, load_encodec, load_huggingface_encodec

GOLDENS = Path(__file__).parents[1] / "goldens"
LATENT = 2e-5
AUDIO = 5e-6


def arrays(name: str) -> dict[str, Tensor]:
    with np.load(GOLDENS / name) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].ndim}


def exported(folder: str) -> EncodecModel:
    path = GOLDENS / folder / "compression_state_dict.bin"
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint, Checkpoint)
    return load_encodec(checkpoint.config, checkpoint.state, checkpoint.source)


def stereo_of(folder: str) -> InterleavedStereo:
    if folder == "stereo_ac":
        return InterleavedStereo(exported(folder))
    return InterleavedStereo(load_huggingface_encodec(GOLDENS / "hub/encodec_32khz"))


def assert_close(actual: Tensor, expected: Tensor, atol: float) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


@pytest.fixture(scope="module")
def mono() -> EncodecModel:
    return exported("text_mono")


def test_an_export_has_its_own_rates_and_sizes(mono: EncodecModel) -> None:
    assert (mono.sample_rate, mono.channels, mono.frame_rate, mono.hop_length) == (32000, 1, 50.0, 640)
    assert (mono.num_codebooks, mono.total_codebooks, mono.cardinality) == (4, 4, 128)


@pytest.mark.parametrize("clip", ["a", "b"])
def test_mono_audio_has_the_recorded_latents_codes_and_audio(mono: EncodecModel, clip: str) -> None:
    golden = arrays("text_mono/encodec.npz")
    wav, codes = golden[f"wav_{clip}"], golden[f"codes_{clip}"]
    assert_close(mono.encoder(wav), golden[f"latent_{clip}"], LATENT)
    encoded, scale = mono.encode(wav)
    assert scale is None
    assert torch.equal(encoded, codes.long())
    assert_close(mono.decode(codes), golden[f"decoded_{clip}"], AUDIO)


def test_given_mono_codes_have_the_recorded_latents_and_audio(mono: EncodecModel) -> None:
    golden = arrays("text_mono/encodec.npz")
    assert_close(mono.decode_latent(golden["fixed_codes"]), golden["fixed_latent"], LATENT)
    assert_close(mono.decode(golden["fixed_codes"]), golden["fixed_decoded"], AUDIO)


def test_a_single_mono_frame_has_the_recorded_audio(mono: EncodecModel) -> None:
    golden = arrays("text_mono/encodec.npz")
    assert_close(mono.decode(golden["one_codes"]), golden["one_decoded"], AUDIO)


@pytest.mark.parametrize("folder", ["stereo_ac", "stereo_hf"])
def test_stereo_audio_has_the_recorded_codes_and_audio(folder: str) -> None:
    golden, stereo = arrays(f"{folder}/encodec.npz"), stereo_of(folder)
    assert (stereo.channels, stereo.num_codebooks, stereo.frame_rate) == (2, 8, 50.0)
    assert torch.equal(stereo.encode(golden["wav_b"])[0], golden["codes_b"].long())
    for name in ("codes_b", "fixed_codes", "one_codes"):
        assert_close(stereo.decode(golden[name]), golden[name.replace("codes", "decoded")], AUDIO)


@pytest.mark.parametrize("folder", ["stereo_ac", "stereo_hf"])
def test_the_stereo_channels_are_the_recorded_ones(folder: str) -> None:
    golden, stereo = arrays(f"{folder}/encodec.npz"), stereo_of(folder)
    for channel, name in enumerate(("fixed_left", "fixed_right")):
        assert torch.equal(golden["fixed_codes"][:, channel::2], golden[name])
        decoded = stereo.model.decode(golden[name])
        assert_close(decoded[:, 0], golden["fixed_decoded"][:, channel], AUDIO)


def test_the_two_dialects_of_one_model_differ_by_their_padding_alone(mono: EncodecModel) -> None:
    other = load_huggingface_encodec(GOLDENS / "hub/encodec_32khz")
    assert (other.sample_rate, other.frame_rate, other.total_codebooks) == (32000, 50.0, 4)
    ours, theirs = mono.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert_close(theirs[name], value, 1e-7)
    golden = arrays("text_mono/encodec.npz")
    assert not torch.equal(other.encode(golden["wav_b"])[0], golden["codes_b"].long())


def test_the_debug_model_has_the_recorded_codes_and_audio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(GOLDENS)
    wavs = importlib.import_module("wavs")
    config = {
        "compression_model": "encodec",
        "sample_rate": 32000,
        "channels": 1,
        "encodec": {"autoencoder": "seanet", "quantizer": "rvq"},
        "seanet": {"n_filters": 4, "n_residual_layers": 1, "dimension": 32, "ratios": [10, 8, 16]},
        "rvq": {"n_q": 4, "bins": 400},
    }
    path = GOLDENS / "debug/debug_states.pt"
    model = load_encodec(config, torch.load(path, weights_only=True)["compression"], str(path))
    assert model.frame_rate == 25.0
    golden = arrays("debug/debug.npz")
    assert_close(model.decode(golden["tokens"][:1]), golden["audio"], AUDIO)
    assert torch.equal(model.encode(wavs.synth(1.0, kind=1)[None])[0], golden["wav_codes"].long())
    assert_close(model.decode(golden["wav_codes"]), golden["wav_decoded"], AUDIO)
