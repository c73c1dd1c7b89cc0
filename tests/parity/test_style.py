"""The style conditioner and what is generated from it equal audiocraft's.

The recordings are of a batch of two; what it was padded to is derived again request by request.
"""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from handler.conditioners import excerpt as excerpt_module
from handler.conditioners.base import WavInput
from handler.conditioners.fuser import Condition
from handler.conditioners.style import StyleConditioner
from handler.conditioners.style_encoder import MertFeatures
from handler.musicgen import MusicGen
from tests.goldens.wavs import synth
from tests.parity.models import D2, GOLDENS, load, max_difference, padded_to
from tests.parity.test_language_model import teacher_forced

RATE = 32_000
LENGTHS = (128_000, 48_000)  # said to be the lengths of two pieces of audio that both go on to 128,000 samples


@pytest.fixture(scope="module")
def conditioner() -> StyleConditioner:
    conditioner = load("style").conditioning.wavs["self_wav"]
    assert isinstance(conditioner, StyleConditioner)
    return conditioner


@pytest.fixture(scope="module")
def golden() -> dict[str, np.ndarray]:
    return dict(np.load(GOLDENS / "style" / "style_conditioner.npz"))


def audio(row: int) -> Tensor:
    return synth(4, kind=row + 1)[0]


def assert_recorded(
    conditioner: StyleConditioner,
    golden: dict[str, np.ndarray],
    name: str,
    frame_rate: float = 75 / 15,
    **params: object,
) -> None:
    for row, length in enumerate(LENGTHS):
        embedding = conditioner(WavInput(audio(row), RATE, **params)).embedding  # type: ignore[arg-type]
        # Of a batch of unequal lengths audiocraft zeroes the vectors beyond the length of each.
        mask = torch.arange(embedding.shape[1]) < length / RATE * frame_rate
        assert mask.int().tolist() == golden[f"mask_{name}"][row].tolist()
        assert max_difference(embedding[0] * mask[:, None], golden[f"emb_{name}"][row]) < 1e-5


def test_mert_hidden_states(conditioner: StyleConditioner, golden: dict[str, np.ndarray]) -> None:
    assert isinstance(conditioner.embed, MertFeatures)
    excerpts = torch.stack([audio(row)[16_000:112_000] for row in range(2)])  # the middle 3 s of 4
    hidden = conditioner.embed.hidden(excerpts)
    assert hidden.shape == (2, 224, 768)
    assert hidden.dtype == torch.float32
    assert max_difference(hidden[:, ::16], golden["mert_hidden_every16"]) < 2e-5


@pytest.mark.parametrize("eval_q", [1, 3, 6])
def test_style_with_each_number_of_codebooks(
    conditioner: StyleConditioner, golden: dict[str, np.ndarray], eval_q: int
) -> None:
    assert_recorded(conditioner, golden, f"q{eval_q}", eval_q=eval_q)


def test_style_of_another_excerpt_length_and_downsampling(
    conditioner: StyleConditioner, golden: dict[str, np.ndarray]
) -> None:
    assert_recorded(conditioner, golden, "q3_len1.5_ds5", frame_rate=75 / 5, excerpt_length=1.5, ds_factor=5)


def test_style_of_an_excerpt_from_a_drawn_start(
    conditioner: StyleConditioner, golden: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = int(golden["random_start_seed1234"])
    monkeypatch.setattr(conditioner, "use_middle", False)
    monkeypatch.setattr(excerpt_module, "excerpt_start", lambda seed, latest: start)
    assert_recorded(conditioner, golden, "random_seed1234")


def test_an_absent_style_is_a_zero_vector(conditioner: StyleConditioner, golden: dict[str, np.ndarray]) -> None:
    condition = conditioner(None)
    assert condition.is_null
    assert not golden["null_emb"].any()
    assert condition.embedding.shape == golden["null_emb"][:1].shape
    assert not condition.embedding.any()


def test_logits_under_a_style() -> None:
    model = load("style")
    golden = np.load(GOLDENS / "style" / "lm_teacher.npz")
    codes = torch.from_numpy(golden["codes"]).long()
    for kind, batch in (("cond", codes), ("null", codes), ("both", torch.cat([codes, codes]))):
        rows = [
            {
                name: Condition(torch.from_numpy(golden[f"{kind}_{name}_emb"][row][None]))
                for name in ("description", "self_wav")
            }
            for row in range(len(batch))
        ]
        conditions = model.fuser.fuse(rows, batch.shape[-1] + 4)
        logits = teacher_forced(model.lm, batch, conditions)
        assert max_difference(logits, golden[f"{kind}_logits"]) < 5e-5


def generated(model: MusicGen, texts: list[str | None], wavs: list[Tensor | None], **params: object) -> np.ndarray:
    model.set_generation_params(use_sampling=False, duration=2.0, **params)
    with padded_to(35):
        tokens = model.generate_with_chroma(texts, wavs, RATE, return_tokens=True)[1]
    return tokens.numpy()


@pytest.mark.parametrize(
    ("name", "params"),
    [
        ("tokens", {}),
        ("double_cfg_beta5_tokens", {"cfg_coef_beta": 5.0}),
        ("double_cfg_beta1_tokens", {"cfg_coef_beta": 1.0}),
    ],
)
def test_greedy_tokens_of_text_and_style(name: str, params: dict[str, float]) -> None:
    expected = np.load(GOLDENS / "style" / "gen_greedy.npz")[name]
    np.testing.assert_array_equal(generated(load("style"), [*D2], [audio(0)[None], audio(1)[None]], **params), expected)


def test_greedy_tokens_of_text_alone() -> None:
    expected = np.load(GOLDENS / "style" / "gen_greedy.npz")["text_only_tokens"]
    np.testing.assert_array_equal(generated(load("style"), [*D2], [None, None]), expected)
    model = load("style")
    with padded_to(35):
        tokens = model.generate([*D2], return_tokens=True)[1]
    np.testing.assert_array_equal(tokens, expected)


def test_greedy_tokens_of_style_alone_and_of_text_beside_it() -> None:
    """In the recorded batch the absent style had as many zero vectors as the other's 15."""
    expected = np.load(GOLDENS / "style" / "gen_greedy.npz")["none_tokens"]
    encode = StyleConditioner.forward

    def padded(self: StyleConditioner, wav: WavInput | None) -> Condition:
        condition = encode(self, wav)
        return Condition(F.pad(condition.embedding, (0, 0, 0, 15 - condition.embedding.shape[1])), condition.is_null)

    with mock.patch.object(StyleConditioner, "forward", padded):
        tokens = generated(load("style"), [None, D2[1]], [audio(0)[None], None])
    np.testing.assert_array_equal(tokens, expected)


def test_double_guidance_with_beta_1_is_simple_guidance() -> None:
    model, wavs = load("style"), [audio(0)[None]]
    simple = generated(model, [D2[0]], [*wavs])
    np.testing.assert_array_equal(generated(model, [D2[0]], [*wavs], cfg_coef_beta=1.0), simple)
