"""Text conditions equal audiocraft's."""

from __future__ import annotations

import numpy as np
import torch

from handler.conditioners.lut import LUTConditioner
from handler.conditioners.t5 import T5Conditioner
from tests.parity.models import GOLDENS, load, max_difference


def test_t5_tokens_hidden_states_and_conditions() -> None:
    golden = np.load(GOLDENS / "text_mono" / "t5.npz")
    t5 = load("text_mono").conditioning.texts["description"]
    assert isinstance(t5, T5Conditioner)
    for i, text in enumerate(golden["texts"]):
        text = None if text == "<None>" else str(text)
        condition = t5(text)
        if not text:
            assert condition.is_null
            assert torch.equal(condition.embedding, torch.zeros(1, 1, 64))
            assert not golden["mask"][i].any()
            continue
        length = int(golden["attention_mask"][i].sum())
        assert t5.token_ids(text) == golden["input_ids"][i, :length].tolist()
        assert max_difference(t5.hidden(text)[0], golden["hidden"][i, :length]) < 2e-5
        assert max_difference(condition.embedding[0], golden["emb"][i, :length]) < 2e-5


def test_t5_conditions_of_a_text_alone() -> None:
    golden = np.load(GOLDENS / "text_mono" / "t5.npz")
    t5 = load("text_mono").conditioning.texts["description"]
    for i in range(2):
        condition = t5(str(golden["texts"][i]))
        assert max_difference(condition.embedding, golden[f"single{i}_emb"]) < 2e-5


def test_lookup_table_conditions() -> None:
    golden = np.load(GOLDENS / "debug" / "debug.npz")
    state = torch.load(GOLDENS / "debug" / "debug_states.pt", weights_only=True)["lm"]
    prefix = "condition_provider.conditioners.description."
    lut = LUTConditioner(128, 16, 16, str.split)
    lut.load_state_dict({k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)})
    lut.requires_grad_(False)
    for tokens, mask, expected in zip(golden["lut_tokens"], golden["lut_mask"], golden["lut_emb"], strict=True):
        length = int(mask.sum())
        embedding = lut._project(lut.embed(torch.from_numpy(tokens[:length]).long())[None]).embedding
        assert torch.allclose(embedding[0], torch.from_numpy(expected[:length]), atol=1e-5)
        assert not expected[length:].any()
    assert lut(None).is_null
