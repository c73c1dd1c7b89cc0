"""The Descript Audio Codec as a compression model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import DacConfig, DacModel

from handler.compression.dac import DacCompression, load_dac
from handler.compression.pretrained import load_pretrained
from handler.errors import CheckpointError


def tiny(ratios: list[int]) -> DacModel:
    torch.manual_seed(3)
    config = DacConfig(
        encoder_hidden_size=4,
        decoder_hidden_size=32,
        downsampling_ratios=ratios,
        n_codebooks=5,
        codebook_size=16,
        codebook_dim=4,
        sampling_rate=24_000,
    )
    model = DacModel(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith(("weight", "bias")):
            parameter.normal_(0, 0.2)
    return model


@pytest.fixture(scope="module")
def reference() -> DacModel:
    return tiny([2, 4])


@pytest.fixture(scope="module")
def folder(reference: DacModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dac") / "dac_24khz"
    reference.save_pretrained(folder)
    return folder


@pytest.fixture
def dac(folder: Path) -> DacCompression:
    return load_dac(folder)


def wav(samples: int) -> Tensor:
    return 0.3 * torch.randn(2, 1, samples, generator=torch.Generator().manual_seed(samples))


def test_a_dac_has_the_rates_and_sizes_of_its_config(dac: DacCompression) -> None:
    assert (dac.sample_rate, dac.channels, dac.frame_rate, dac.hop_length) == (24_000, 1, 3000.0, 8)
    assert (dac.num_codebooks, dac.total_codebooks, dac.cardinality) == (5, 5, 16)


@pytest.mark.parametrize("num_codebooks", [1, 3, 5])
def test_codes_and_audio_are_those_of_transformers(
    dac: DacCompression, reference: DacModel, num_codebooks: int
) -> None:
    dac.set_num_codebooks(num_codebooks)
    codes, scale = dac.encode(wav(800))
    assert scale is None
    assert codes.dtype == torch.int64
    assert torch.equal(codes, reference.encode(wav(800), num_codebooks).audio_codes)
    assert codes.shape == (2, num_codebooks, 100)
    decoded = dac.decode(codes)
    assert decoded.shape == (2, 1, 800)
    assert torch.equal(decoded[:, 0], reference.decode(audio_codes=codes).audio_values)
    assert torch.equal(dac.decode(codes.int()), decoded)


@pytest.mark.parametrize("samples", [1, 7, 9, 801])
def test_the_last_frame_is_filled_with_zeros(dac: DacCompression, samples: int) -> None:
    frames = -(-samples // 8)
    padded = torch.zeros(2, 1, frames * 8)
    padded[..., :samples] = wav(samples)
    codes, _ = dac.encode(wav(samples))
    assert codes.shape == (2, 5, frames)
    assert torch.equal(codes, dac.encode(padded)[0])


def test_an_odd_stride_still_decodes_to_whole_frames(tmp_path: Path) -> None:
    reference = tiny([2, 5])
    reference.save_pretrained(tmp_path)
    dac = load_dac(tmp_path)
    codes, _ = dac.encode(wav(95))
    assert codes.shape[-1] == 10
    decoded, theirs = dac.decode(codes)[:, 0], reference.decode(audio_codes=codes).audio_values
    assert decoded.shape == (2, 100)
    assert torch.equal(decoded[:, : theirs.shape[1]], theirs)
    assert 0 < 100 - theirs.shape[1] < 10
    assert not decoded[:, theirs.shape[1] :].any()


def test_what_is_no_audio_or_no_codes_is_refused(dac: DacCompression) -> None:
    with pytest.raises(ValueError, match="1 to 5"):
        dac.set_num_codebooks(6)
    with pytest.raises(ValueError, match="channels"):
        dac.encode(torch.zeros(1, 2, 8))
    with pytest.raises(ValueError, match=r"\[0, 16\)"):
        dac.decode(torch.full((1, 5, 1), 16))
    with pytest.raises(ValueError, match="scale"):
        dac.decode(torch.zeros(1, 5, 1, dtype=torch.long), torch.ones(1, 1))


@pytest.mark.parametrize("name", ["dac_44khz", "dac_24khz"])
def test_a_pointer_finds_the_folder_by_its_hub_id(folder: Path, name: str) -> None:
    asked = []

    def find(auxiliary: str) -> Path:
        asked.append(auxiliary)
        return folder

    assert isinstance(load_pretrained(name, find), DacCompression)
    assert asked == [f"descript/{name}"]


def test_weight_norm_in_the_file_is_folded(reference: DacModel, tmp_path: Path, dac: DacCompression) -> None:
    normed = tiny([2, 4])
    normed.apply_weight_norm()
    torch.save(normed.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict()))
    folded = load_dac(tmp_path)
    for name, tensor in dac.state_dict().items():
        torch.testing.assert_close(folded.state_dict()[name], tensor, rtol=0, atol=1e-6)


def test_weights_that_do_not_fit_are_refused(reference: DacModel, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict()))
    state = reference.state_dict()
    torch.save(state | {"surprise": torch.zeros(1)}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="surprise"):
        load_dac(tmp_path)
    torch.save({k: v for k, v in state.items() if k != "decoder.conv1.bias"}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"decoder\.conv1\.bias"):
        load_dac(tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"model_type": "encodec"}, "model_type"),
        ({"codebook_size": 15}, "power of 2"),
        ({"n_codebooks": "9"}, "n_codeb"),
    ],
)
def test_a_config_that_is_no_dacs_is_refused(
    reference: DacModel, tmp_path: Path, change: dict[str, object], told: str
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(reference.config.to_dict() | change))
    with pytest.raises(CheckpointError, match=told):
        load_dac(tmp_path)
