"""Greedy tokens equal audiocraft's, in every way of generating that the text models have.

Runs that audiocraft recorded as a batch of unequal prompts were padded; they are derived again with `padded_to`,
and what a user gets is compared with the recordings of batches of one (`alone*`, `uncond`, `tokens44`).
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from handler.musicgen import MusicGen
from tests.parity.models import D2, GOLDENS, load, padded_to


@pytest.fixture
def text_mono() -> Iterator[MusicGen]:
    model = load("text_mono")
    yield model
    model.max_duration = 30.0


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / f"{name}.npz"))


def assert_tokens(codes: torch.Tensor, expected: np.ndarray) -> None:
    np.testing.assert_array_equal(codes.numpy(), expected)


def greedy(model: MusicGen, duration: float, **params: object) -> None:
    model.set_generation_params(use_sampling=False, duration=duration, **params)


def test_a_prompt_alone(text_mono: MusicGen) -> None:
    greedy(text_mono, 2.5)
    expected = golden("text_mono/gen_greedy")
    for i, prompt in enumerate(D2):
        wav, codes = text_mono.generate([prompt], return_tokens=True)
        assert_tokens(codes, expected[f"alone{i}_tokens"])
        assert wav.shape == (1, 1, 80000)


def test_prompts_together_are_each_as_alone(text_mono: MusicGen) -> None:
    greedy(text_mono, 2.5)
    expected = golden("text_mono/gen_greedy")
    _, codes = text_mono.generate(D2, return_tokens=True)
    assert_tokens(codes, np.concatenate([expected["alone0_tokens"], expected["alone1_tokens"]]))


def test_a_padded_batch_and_its_audio(text_mono: MusicGen) -> None:
    greedy(text_mono, 2.5)
    expected = golden("text_mono/gen_greedy")
    with padded_to(35):
        wav, codes = text_mono.generate(D2, return_tokens=True)
    assert_tokens(codes, expected["tokens"])
    np.testing.assert_allclose(wav.numpy(), expected["audio"], atol=5e-6)


def test_absent_and_empty_prompts_beside_a_real_one(text_mono: MusicGen) -> None:
    greedy(text_mono, 2.5)
    _, codes = text_mono.generate([None, D2[0], ""], return_tokens=True)
    assert_tokens(codes, golden("text_mono/gen_greedy")["none_tokens"])


def test_unconditional_and_an_absent_prompt(text_mono: MusicGen) -> None:
    greedy(text_mono, 2.5)
    expected = golden("text_mono/gen_greedy")["uncond_tokens"]
    _, codes = text_mono.generate_unconditional(2, return_tokens=True)
    assert_tokens(codes, expected)
    _, codes = text_mono.generate([None, ""], return_tokens=True)
    assert_tokens(codes, expected)


def test_two_step_guidance_honours_its_coefficient(text_mono: MusicGen) -> None:
    expected = golden("text_mono/gen_two_step")
    with padded_to(35):
        # Recorded with coefficient 7 given, but audiocraft used the model's own 3.
        greedy(text_mono, 2.0, two_step_cfg=True, cfg_coef=3.0)
        assert_tokens(text_mono.generate(D2, return_tokens=True)[1], expected["tokens_two_step_coef7"])
        greedy(text_mono, 2.0, cfg_coef=7.0)
        seven = text_mono.generate(D2, return_tokens=True)[1]
        assert_tokens(seven, expected["tokens_batched_coef7"])
        # With cross-attention alone the null row has no padding to lose, so both ways must agree.
        greedy(text_mono, 2.0, two_step_cfg=True, cfg_coef=7.0)
        assert_tokens(text_mono.generate(D2, return_tokens=True)[1], seven.numpy())


def test_no_guidance(text_mono: MusicGen) -> None:
    greedy(text_mono, 2.0, cfg_coef=1.0)
    with padded_to(35):
        codes = text_mono.generate(D2, return_tokens=True)[1]
    assert_tokens(codes, golden("text_mono/gen_two_step")["tokens_batched_coef1"])


def test_double_guidance_of_a_text_model_with_beta_1_is_simple_guidance(text_mono: MusicGen) -> None:
    greedy(text_mono, 2.5, cfg_coef_beta=1.0)
    codes = text_mono.generate([D2[1]], return_tokens=True)[1]
    assert_tokens(codes, golden("text_mono/gen_greedy")["alone1_tokens"])


def test_a_continuation(text_mono: MusicGen) -> None:
    greedy(text_mono, 2.0)
    expected = golden("text_mono/gen_continuation")
    with padded_to(35):
        _, codes = text_mono.generate_continuation(torch.from_numpy(expected["prompt"]), 32000, D2, return_tokens=True)
    assert_tokens(codes[..., :25], expected["prompt_codes"])
    assert_tokens(codes, expected["tokens"])


def test_a_continuation_of_stereo_audio_at_44_1_khz(text_mono: MusicGen) -> None:
    greedy(text_mono, 2.0)
    expected = golden("text_mono/gen_continuation")
    _, codes = text_mono.generate_continuation(torch.from_numpy(expected["prompt44"]), 44100, return_tokens=True)
    assert_tokens(codes, expected["tokens44"])


def test_music_longer_than_a_window(text_mono: MusicGen) -> None:
    expected = golden("text_mono/gen_extended")
    text_mono.max_duration = 5.0
    greedy(text_mono, 9.0, extend_stride=3)
    with padded_to(35):
        wav, codes = text_mono.generate(D2, return_tokens=True)
        prompt = torch.from_numpy(golden("text_mono/gen_continuation")["prompt"])
        _, continued = text_mono.generate_continuation(prompt, 32000, D2, return_tokens=True)
    assert_tokens(codes, expected["tokens"])
    assert_tokens(continued, expected["cont_tokens"])
    assert wav.shape == (2, 1, 9 * 32000)


@pytest.mark.parametrize("name", ["stereo_ac", "stereo_hf"])
def test_stereo(name: str) -> None:
    model, expected = load(name), golden(f"{name}/gen_greedy")
    greedy(model, 2.0)
    with padded_to(35):
        wav, codes = model.generate(D2, return_tokens=True)
    assert_tokens(codes, expected["tokens"])
    np.testing.assert_allclose(wav[:1, :, :32000].numpy(), expected["audio_first_second"], atol=5e-6)


@pytest.mark.parametrize("name", ["stereo_ac", "stereo_hf"])
@pytest.mark.parametrize("prompt", ["cont", "cont_mono"])
def test_a_stereo_continuation(name: str, prompt: str) -> None:
    model, expected = load(name), golden(f"{name}/gen_greedy")
    greedy(model, 2.0)
    wav = torch.from_numpy(expected[f"{prompt}_prompt"])
    _, codes = model.generate_continuation(wav, 32000, D2[:1], return_tokens=True)
    assert_tokens(codes, expected[f"{prompt}_tokens"])
