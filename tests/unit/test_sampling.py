"""Draws: a function of (seed, step, codebook), from the right distribution, never of a token left out."""

from __future__ import annotations

import pytest
import torch

from handler.lm.decoder import sample
from handler.lm.sampling import Sampling, draw, guide, keep_top_k, uniform_draws


def test_draws_are_a_function_of_seed_step_and_codebook_alone() -> None:
    long, short = uniform_draws(7, 100, 4), uniform_draws(7, 10, 4)
    assert torch.equal(long[:10], short)
    assert not torch.equal(uniform_draws(8, 10, 4), short)
    assert uniform_draws(2**63 - 1, 3, 4).shape == (3, 4)


def test_draws_are_uniform_below_one() -> None:
    draws = uniform_draws(1, 50_000, 4)
    assert 0 <= draws.min() < draws.max() < 1
    assert abs(draws.mean() - 0.5) < 0.01
    assert abs(draws.var() - 1 / 12) < 0.01


def test_frequencies_follow_the_weights() -> None:
    weights = torch.tensor([0.0, 1.0, 0.0, 3.0, 4.0, 0.0]).expand(1, 20_000, -1)
    tokens = draw(weights, uniform_draws(3, 1, 20_000))
    frequencies = torch.bincount(tokens.flatten(), minlength=6) / 20_000
    assert torch.allclose(frequencies, torch.tensor([0, 1 / 8, 0, 3 / 8, 1 / 2, 0]), atol=0.02)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-24])
def test_a_token_without_weight_is_never_drawn(uniform: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = torch.rand(8, 16, 999, generator=generator) * (torch.rand(8, 16, 999, generator=generator) > 0.7)
    weights[..., :5] = weights[..., -5:] = 0
    tokens = draw(weights, torch.full((8, 16), uniform))
    assert (weights.gather(-1, tokens[..., None]) > 0).all()


def test_top_k_keeps_ties_of_the_last() -> None:
    probabilities = torch.tensor([[[0.1, 0.3, 0.2, 0.2, 0.2]], [[0.1, 0.3, 0.2, 0.2, 0.2]]])
    kept = keep_top_k(probabilities, torch.tensor([2, 1]), 2)
    assert kept[:, 0].tolist() == [[False, True, True, True, True], [False, True, False, False, False]]


def test_each_request_draws_by_its_own_settings() -> None:
    logits = torch.randn(6, 4, 50, generator=torch.Generator().manual_seed(1))
    uniform = uniform_draws(5, 6, 4)
    settings = [
        Sampling(),
        Sampling(use_sampling=False),
        Sampling(top_k=3),
        Sampling(top_k=0, top_p=0.6),
        Sampling(temperature=0.0),
        Sampling(top_k=10**6, temperature=0.2),
    ]
    together = sample(logits, settings, uniform)
    for i, setting in enumerate(settings):
        assert torch.equal(sample(logits[i : i + 1], [setting], uniform[i : i + 1])[0], together[i])
    assert torch.equal(together[1], logits[1].argmax(-1))
    assert torch.equal(together[4], logits[4].argmax(-1))
    assert (logits[2].gather(-1, together[2][:, None]) >= logits[2].topk(3).values[:, -1:]).all()


def test_guidance_between_equal_rows_changes_no_bit() -> None:
    logits = torch.randn(2, 4, 50)
    ones = torch.ones(2, 1, 1)
    assert torch.equal(guide(logits, logits, logits, 3.7 * ones, 5 * ones), logits)
