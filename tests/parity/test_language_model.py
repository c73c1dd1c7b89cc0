"""Teacher-forced logits equal audiocraft's, given the condition vectors it recorded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from handler.lm.conditions import FusedConditions
from handler.lm.model import LanguageModel
from tests.parity.models import GOLDENS, load, max_difference


def logits_of(lm: LanguageModel, sequence: Tensor, conditions: FusedConditions) -> Tensor:
    """Logits `[B, K, S, card]` after each step of sequences `[B, K, S]`."""
    logits = lm.logits(lm(sequence, conditions).flatten(0, 1))  # [B * S, K, card]
    return logits.unflatten(0, (len(sequence), -1)).transpose(1, 2)


def teacher_forced(lm: LanguageModel, codes: Tensor, conditions: FusedConditions) -> Tensor:
    """Logits `[B, K, T, card]` of codes `[B, K, T]`, NaN where the pattern has none."""
    pattern = lm.pattern_provider.get(codes.shape[-1])
    sequence, _ = pattern.build(codes, lm.special_token, only_valid_steps=True)
    return pattern.revert_logits(logits_of(lm, sequence, conditions), only_valid_steps=True)[0]


def cross(embedding: np.ndarray) -> FusedConditions:
    source = torch.from_numpy(embedding)
    return FusedConditions(len(source), torch.zeros(len(source), 0, source.shape[-1]), source)


@pytest.mark.parametrize("name", ["text_mono", "stereo_ac"])
def test_logits_under_cross_attention(name: str) -> None:
    golden = np.load(GOLDENS / name / "lm_teacher.npz")
    lm = load(name).lm
    codes = torch.from_numpy(golden["codes"]).long()
    for conditions, batch in (("cond", codes), ("null", codes), ("both", torch.cat([codes, codes]))):
        logits = teacher_forced(lm, batch, cross(golden[f"{conditions}_description_emb"]))
        assert max_difference(logits, golden[f"{conditions}_logits"]) < 5e-5
    sequence = torch.from_numpy(golden["sequence"]).long()
    raw = logits_of(lm, sequence, cross(golden["cond_description_emb"]))
    assert max_difference(raw[:, :, 0], golden["sequence_logits_cond_step0"]) < 5e-5
    assert max_difference(raw[:, :, -1], golden["sequence_logits_cond_last"]) < 5e-5


def test_a_null_condition_needs_no_cross_attention() -> None:
    golden = np.load(GOLDENS / "text_mono" / "lm_teacher.npz")
    lm = load("text_mono").lm
    codes = torch.from_numpy(golden["codes"]).long()
    null = FusedConditions(len(codes), torch.zeros(len(codes), 0, lm.config.dim), None)
    assert max_difference(teacher_forced(lm, codes, null), golden["null_logits"]) < 5e-5
