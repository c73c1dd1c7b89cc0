"""The compression model that a pointer to `debug_compression_model` means."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from handler.compression import load_encodec
from handler.compression.debug import debug_config, debug_encodec
from handler.compression.pretrained import load_pretrained

GOLDENS = Path(__file__).parents[1] / "goldens"


@pytest.mark.parametrize("sample_rate", [16_000, 32_000])
def test_it_codes_25_frames_a_second_at_both_rates(sample_rate: int) -> None:
    model = debug_encodec(sample_rate)
    assert (model.sample_rate, model.frame_rate, model.channels) == (sample_rate, 25.0, 1)
    assert (model.num_codebooks, model.cardinality) == (4, 400)
    codes, _ = model.encode(torch.rand(1, 1, sample_rate) - 0.5)
    assert codes.shape == (1, 4, 25)
    wav = model.decode(codes)
    assert wav.shape == (1, 1, sample_rate)
    assert wav.isfinite().all()
    assert wav.std() > 1e-3


def test_it_has_the_parameters_of_audiocrafts() -> None:
    state = torch.load(GOLDENS / "debug" / "debug_states.pt", weights_only=True)["compression"]
    theirs = load_encodec(debug_config(), state, "debug_states.pt").state_dict()
    ours = debug_encodec().state_dict()
    assert {name: tensor.shape for name, tensor in ours.items()} == {n: tensor.shape for n, tensor in theirs.items()}


def test_it_is_the_same_every_time() -> None:
    torch.manual_seed(1)
    first = debug_encodec().state_dict()
    torch.manual_seed(2)
    second = load_pretrained("debug_compression_model", lambda name: Path(name)).state_dict()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())


def test_another_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="16000 or 32000"):
        debug_encodec(44_100)
