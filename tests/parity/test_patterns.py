"""Codebook patterns and sinusoids equal audiocraft's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from handler.lm.embedding import sinusoidal_embedding
from handler.lm.patterns import PatternProvider, get_pattern_provider

GOLDENS = Path(__file__).parent.parent / "goldens" / "patterns"

PROVIDERS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "parallel": ("parallel", 4, {}),
    "delay_0123": ("delay", 4, {}),
    "delay_0246": ("delay", 4, {"delays": [0, 2, 4, 6]}),
    "delay_empty1": ("delay", 4, {"empty_initial": 1}),
    "delay_flatten2": ("delay", 4, {"flatten_first": 2}),
    "delay_stereo": ("delay", 8, {"delays": [0, 0, 1, 1, 2, 2, 3, 3]}),
    "unroll": ("unroll", 4, {}),
    "coarse_first": ("coarse_first", 4, {}),
    "music_lm": ("musiclm", 4, {}),
}


@pytest.fixture(params=PROVIDERS)
def case(request: pytest.FixtureRequest) -> tuple[PatternProvider, dict[str, Any]]:
    arrays = np.load(GOLDENS / "patterns.npz")
    prefix = f"{request.param}."
    return get_pattern_provider(*PROVIDERS[request.param]), {
        name.removeprefix(prefix): arrays[name] for name in arrays.files if name.startswith(prefix)
    }


@pytest.mark.parametrize("only_valid", [False, True])
def test_sequences_and_codes_are_laid_out_as_audiocraft_does(
    case: tuple[PatternProvider, dict[str, Any]], only_valid: bool
) -> None:
    provider, golden = case
    expected = {k.removeprefix(f"valid{only_valid:d}."): v for k, v in golden.items()}
    codes = torch.from_numpy(golden["codes"]).long()
    pattern = provider.get(codes.shape[-1])
    sequence, mask = pattern.build(codes, 64, only_valid)
    np.testing.assert_array_equal(sequence.numpy(), expected["seq"])
    np.testing.assert_array_equal(mask.numpy(), expected["seq_mask"])
    reverted, reached = pattern.revert(sequence, -1)
    np.testing.assert_array_equal(reverted.numpy(), expected["rev"])
    np.testing.assert_array_equal(reached.numpy(), expected["rev_mask"])


@pytest.mark.parametrize("only_valid", [False, True])
def test_logits_are_aligned_with_the_codes_they_predict(
    case: tuple[PatternProvider, dict[str, Any]], only_valid: bool
) -> None:
    provider, golden = case
    pattern = provider.get(10)
    steps = golden[f"valid{only_valid:d}.seq"].shape[-1]
    codebooks = golden["codes"].shape[1]
    fake = torch.arange(steps).float() + 100 * torch.arange(codebooks)[:, None]  # [K, S]
    logits, mask = pattern.revert_logits(fake[None, ..., None], only_valid)
    np.testing.assert_array_equal(logits[0, ..., 0].numpy(), golden[f"valid{only_valid:d}.logits_rev"])
    np.testing.assert_array_equal(mask.numpy(), golden[f"valid{only_valid:d}.logits_mask"])


def test_generation_starts_at_the_first_step_of_a_frame(case: tuple[PatternProvider, dict[str, Any]]) -> None:
    provider, golden = case
    first_steps = [provider.get(10).first_step_of(t) for t in range(10)]
    np.testing.assert_array_equal(first_steps, golden["first_step_with_timestep"])


@pytest.mark.parametrize("dim", [64, 1024])
def test_sinusoids_equal_audiocrafts(dim: int) -> None:
    golden = np.load(GOLDENS / "sin_embedding.npz")
    embedding = sinusoidal_embedding(torch.from_numpy(golden["positions"]), dim).numpy()
    expected = golden[f"dim{dim}"][0]
    np.testing.assert_allclose(embedding[:4], expected[:4], atol=1e-6)
    np.testing.assert_allclose(embedding[4:], expected[4:], atol=2e-4)
