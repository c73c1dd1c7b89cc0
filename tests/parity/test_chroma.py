"""The melody conditioner, and what melody models generate, equal audiocraft's.

audiocraft separates the stems at a random offset in time, drawn from Python's `random`; we separate them at none. The
recordings are derived again by drawing the offset as audiocraft did: see `RandomShift`. Likewise their padding: see
`padded_to`.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import pytest
import torch
from demucs.apply import apply_model
from torch import Tensor
from torch.nn import functional as F

from handler.conditioners.base import WavInput
from handler.conditioners.chroma import Chroma, ChromaStemConditioner
from handler.lm.conditions import FusedConditions
from handler.musicgen import MusicGen
from tests.goldens.wavs import synth
from tests.parity.models import D2, GOLDENS, load, max_difference, padded_to
from tests.parity.test_language_model import logits_of, teacher_forced

MELODIES = [synth(4, kind=1), synth(4, kind=2)]
"""The melodies of the recordings, `[1, T]` at 32 kHz."""


class RandomShift:
    """demucs with the shift trick, drawing the same offset for all melodies of a batch.

    audiocraft separates a batch in one pass, so draws once for each window of music; we separate each melody alone.

    Args:
        melodies: how many a batch has.
    """

    def __init__(self, conditioner: ChromaStemConditioner, melodies: int, seed: int = 0) -> None:
        self.model, self.melodies, self.separated = conditioner.separator.model, melodies, 0
        random.seed(seed)

    def __call__(self, mix: Tensor) -> Tensor:
        if self.separated % self.melodies == 0:
            self.state = random.getstate()
        random.setstate(self.state)
        self.separated += 1
        return apply_model(self.model, mix, shifts=1)


@pytest.fixture
def model() -> Iterator[MusicGen]:
    model = load("melody")
    yield model
    model.max_duration = 30.0


@pytest.fixture
def conditioner(model: MusicGen) -> ChromaStemConditioner:
    conditioner = model.conditioning.conditioners["self_wav"]
    assert isinstance(conditioner, ChromaStemConditioner)
    return conditioner


def golden(name: str) -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / "melody" / f"{name}.npz"))


def test_the_filter_bank(conditioner: ChromaStemConditioner) -> None:
    np.testing.assert_allclose(conditioner.chroma.filters, golden("chroma")["fbanks"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", ["noargmax", "argmax"])
def test_chroma_of_a_mix(conditioner: ChromaStemConditioner, kind: str) -> None:
    chroma = Chroma(32000, 12, 2**14, argmax=kind == "argmax")
    chroma.load_state_dict(conditioner.chroma.state_dict())
    expected = golden("chroma")[f"chroma_{kind}_nodemucs"]
    for melody, frames in zip(MELODIES, expected, strict=True):
        np.testing.assert_allclose(chroma(melody[0]), frames, rtol=0, atol=0 if kind == "argmax" else 1e-5)


@pytest.mark.parametrize("seed", [0, 1])
def test_chroma_of_the_stems(conditioner: ChromaStemConditioner, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(conditioner.separator, "stems", RandomShift(conditioner, 2, seed))
    expected = golden("chroma")
    for i, melody in enumerate(MELODIES):
        stems = conditioner.separator(melody[0], 32000)
        if seed == 0:
            assert max_difference(stems[:32000], expected["stems_mix_seed0"][i, 0]) < 1e-6
        np.testing.assert_array_equal(conditioner.chroma(stems), expected[f"chroma_argmax_seed{seed}"][i])


def test_without_the_random_shift_few_frames_change(conditioner: ChromaStemConditioner) -> None:
    # Between two random shifts 14 of 64 frames change: the weights here are random, so the stems are near noise.
    expected = golden("chroma")["chroma_argmax_seed0"]
    chroma = [conditioner.chroma(conditioner.separator(melody[0], 32000)) for melody in MELODIES]
    changed = (torch.stack(chroma).numpy() != expected).any(axis=-1)
    assert changed.sum() <= 14


def test_embeddings(conditioner: ChromaStemConditioner, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = golden("chroma")
    assert conditioner.length == expected["chroma_len"]
    silence = torch.zeros_like(MELODIES[0])
    for name, melodies in (("emb_seed0", MELODIES), ("half_null_emb", [MELODIES[0], silence])):
        monkeypatch.setattr(conditioner.separator, "stems", RandomShift(conditioner, 2))
        for melody, embedding in zip(melodies, expected[name], strict=True):
            condition = conditioner(WavInput(melody[0], 32000))
            assert not condition.is_null
            assert max_difference(condition.embedding[0], embedding) < 1e-5


@pytest.mark.parametrize("length", [1, 235, 300])
def test_an_absent_melody_is_that_of_silence(conditioner: ChromaStemConditioner, length: int) -> None:
    expected = golden("chroma")
    for condition in (conditioner.null(length), conditioner(None)):
        assert condition.is_null
        assert max_difference(condition.embedding, expected["null_emb"][:1]) < 1e-5
    assert max_difference(conditioner.null(length).embedding[0, 0], expected["onehot0_proj"]) < 1e-5


def prepended(recording: dict[str, np.ndarray], conditions: str) -> FusedConditions:
    """Recorded condition vectors in front of the codes, the melody's first."""
    embeddings = [recording[f"{conditions}_{name}_emb"] for name in ("self_wav", "description")]
    prefix = torch.from_numpy(np.concatenate(embeddings, axis=1))
    return FusedConditions(len(prefix), prefix)


def test_logits_under_prepended_conditions(model: MusicGen) -> None:
    recording = golden("lm_teacher")
    codes = torch.from_numpy(recording["codes"]).long()
    for conditions, batch in (("cond", codes), ("null", codes), ("both", torch.cat([codes, codes]))):
        logits = teacher_forced(model.lm, batch, prepended(recording, conditions))
        assert max_difference(logits, recording[f"{conditions}_logits"]) < 5e-5
    raw = logits_of(model.lm, torch.from_numpy(recording["sequence"]).long(), prepended(recording, "cond"))
    assert max_difference(raw[:, :, 0], recording["sequence_logits_cond_step0"]) < 5e-5
    assert max_difference(raw[:, :, -1], recording["sequence_logits_cond_last"]) < 5e-5


Generate = Callable[..., np.ndarray]


@pytest.fixture
def generate(
    model: MusicGen, conditioner: ChromaStemConditioner, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Generate]:
    """Greedy codes `[B, K, frames]` of texts and melodies, of 2 s unless the parameters say otherwise."""

    def generate(
        texts: Sequence[str | None], melodies: Sequence[Tensor | None], rate: int = 32000, **params: object
    ) -> np.ndarray:
        given = sum(melody is not None for melody in melodies)
        monkeypatch.setattr(conditioner.separator, "stems", RandomShift(conditioner, given))
        model.set_generation_params(**{"use_sampling": False, "duration": 2.0, **params})
        return model.generate_with_chroma(texts, melodies, rate, return_tokens=True)[1].numpy()

    yield generate
    model.set_generation_params()


def test_a_prompt_and_a_melody_alone(generate: Generate) -> None:
    codes = generate(D2[:1], MELODIES[:1])
    np.testing.assert_array_equal(codes, golden("gen_greedy")["alone0_tokens"])


def test_a_stereo_melody_at_44_1_khz(generate: Generate) -> None:
    codes = generate(D2[:1], [synth(2, 44100, kind=3, channels=2)], 44100)
    np.testing.assert_array_equal(codes, golden("gen_greedy")["tokens44"])


def test_a_padded_batch(generate: Generate) -> None:
    with padded_to(35):
        codes = generate(D2, MELODIES)
    np.testing.assert_array_equal(codes, golden("gen_greedy")["tokens"])


def test_absent_melodies_and_prompts_beside_real_ones(generate: Generate) -> None:
    # audiocraft gives all melodies of a batch the length of the longest, before demucs.
    shorter = F.pad(synth(2, kind=2), (0, 2 * 32000))
    with padded_to(35):
        codes = generate([*D2, None], [MELODIES[0], None, shorter])
    np.testing.assert_array_equal(codes, golden("gen_greedy")["none_tokens"])


def test_prompts_without_melodies(model: MusicGen, generate: Generate) -> None:
    expected = golden("gen_greedy")
    with padded_to(35):
        np.testing.assert_array_equal(generate(D2, [None, None]), expected["text_only_tokens"])
        codes = model.generate(D2, return_tokens=True)[1]
        np.testing.assert_array_equal(codes, expected["text_only_tokens"])


def test_neither_a_prompt_nor_a_melody(model: MusicGen, generate: Generate) -> None:
    expected = golden("gen_greedy")["uncond_tokens"]
    np.testing.assert_array_equal(generate([None], [None]), expected)
    np.testing.assert_array_equal(model.generate_unconditional(1, return_tokens=True)[1], expected)


def test_double_guidance(generate: Generate) -> None:
    with padded_to(35):
        codes = generate(D2, MELODIES, cfg_coef_beta=4.0)
    np.testing.assert_array_equal(codes, golden("gen_double_cfg")["tokens"])


def test_two_step_guidance(generate: Generate) -> None:
    expected = golden("gen_two_step")
    with padded_to(35):
        np.testing.assert_array_equal(generate(D2, MELODIES, two_step_cfg=True), expected["tokens"])
        codes = generate(D2, [None, None], two_step_cfg=True)
    np.testing.assert_array_equal(codes, expected["text_only_tokens"])


def test_music_longer_than_a_window_follows_the_melody_in_time(model: MusicGen, generate: Generate) -> None:
    model.max_duration = 6.0
    with padded_to(35):
        codes = generate(D2, MELODIES, duration=9.0, extend_stride=4.0)
    np.testing.assert_array_equal(codes, golden("gen_extended")["tokens"])
