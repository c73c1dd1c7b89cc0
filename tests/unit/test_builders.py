"""What an `xp.cfg` may say, and what becomes of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from handler.builders import build_conditioners, build_fuser, build_language_model
from handler.conditioners.lut import hash_bin, lemmas
from handler.errors import CheckpointError
from tests.checkpoints import lm_checkpoint

UNHONOURABLE: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"num_layers": 0}, {}, "transformer_lm.num_layers"),
    ({"causal": False}, {}, "transformer_lm.causal"),
    ({"norm": "rms_norm"}, {}, "transformer_lm.norm"),
    ({"activation": "swiglu"}, {}, "transformer_lm.activation"),
    ({"positional_embedding": "alibi"}, {}, "transformer_lm.positional_embedding"),
    ({"dim": 30}, {}, "transformer_lm.dim"),
    ({"kv_repeat": 3}, {}, "transformer_lm.kv_repeat"),
    ({"kv_repeat": 2}, {}, "neither with cross-attention"),
    ({}, {"lm_model": "transformer_lm_magnet"}, "lm_model"),
    ({}, {"codebooks_pattern": {"modeling": "spiral"}}, "codebooks_pattern.modeling"),
    ({}, {"codebooks_pattern": {"modeling": "delay", "delay": {"delays": [0, 1]}}}, "codebooks_pattern.delay"),
    ({}, {"codebooks_pattern": {"modeling": "delay", "delay": {"speed": 2}}}, "codebooks_pattern.delay"),
]


@pytest.mark.parametrize(("lm", "sections", "named"), UNHONOURABLE)
def test_a_key_that_cannot_be_honoured_is_an_error_that_names_it(
    lm: dict[str, Any], sections: dict[str, Any], named: str
) -> None:
    with pytest.raises(CheckpointError, match=named.replace(".", r"\.")):
        build_language_model(lm_checkpoint(lm, **sections))


def test_training_keys_and_unknown_keys_are_ignored_and_the_unknown_logged_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.INFO, logger="handler"):
        build_language_model(lm_checkpoint({"depthwise_init": "current", "sparkle": 3, "glitter": None}))
    assert [r.getMessage() for r in caplog.records if "sparkle" in r.getMessage()] == [
        "state_dict.bin: keys of transformer_lm without a known meaning are ignored: glitter, sparkle"
    ]


def test_the_first_models_name_their_pattern_in_the_language_model() -> None:
    lm = build_language_model(lm_checkpoint({"q_modeling": "parallel"}, codebooks_pattern={"modeling": None}))
    assert lm.pattern_provider.get(5).num_steps == 6
    lm = build_language_model(lm_checkpoint({"q_modeling": "valle"}, codebooks_pattern={}))
    assert lm.pattern_provider.get(5).num_steps == 11


def no_auxiliary(name: str) -> Path:
    raise AssertionError(f"nothing should look for {name}")


def test_a_conditioner_nobody_knows_is_named() -> None:
    checkpoint = lm_checkpoint({}, conditioners={"description": {"model": "clap", "clap": {}}})
    with pytest.raises(CheckpointError, match=r"conditioners\.description\.model of its xp\.cfg is 'clap'"):
        build_conditioners(checkpoint, no_auxiliary)


def test_lookup_conditioners_hash_whole_texts() -> None:
    provider = build_conditioners(lm_checkpoint(), no_auxiliary)
    rock, again, none = (provider.encode(text)["description"] for text in ("hard rock", "hard rock", None))
    assert torch.equal(rock.embedding, again.embedding)
    assert rock.embedding.shape == (1, 1, 32)
    assert none.is_null
    assert not none.embedding.any()
    state = lm_checkpoint().state
    prefix = "condition_provider.conditioners.description"
    hidden = state[f"{prefix}.embed.weight"][hash_bin("hard rock", 64)]
    expected = state[f"{prefix}.output_proj.weight"] @ hidden + state[f"{prefix}.output_proj.bias"]
    torch.testing.assert_close(rock.embedding[0, 0], expected)


def test_whitespace_tokens_without_spacy_are_a_clear_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "spacy", None)
    lut = {"model": "lut", "lut": {"n_bins": 64, "dim": 16, "tokenizer": "whitespace"}}
    with pytest.raises(CheckpointError, match=r"conditioners\.description\.lut\.tokenizer needs spaCy"):
        build_conditioners(lm_checkpoint({}, conditioners={"description": lut}), no_auxiliary)


class _Token:
    def __init__(self, text: str) -> None:
        self.text, self.lemma_, self.is_stop = text, text.lower().rstrip("s"), text in ("the", "and")


def test_natural_words_are_lemmas_without_stop_words_and_punctuation() -> None:
    words = lemmas("the 80 drums and Synths !", lambda t: [_Token(w) for w in t.split()], lambda n: f"number{n}")
    assert words == ["number80", "drum", "synth"]


def test_a_condition_fused_two_ways_is_named() -> None:
    checkpoint = lm_checkpoint({}, fuser={"cross": ["description"], "prepend": ["description"]})
    with pytest.raises(CheckpointError, match=r"fuser\.cross: the condition 'description'"):
        build_fuser(checkpoint.config)


def test_hash_bins_are_those_of_sha256() -> None:
    # sha256("abc") = ba7816bf 8f01cfea 414140de 5dae2223 b00361a3 96177a9c b410ff61 f20015ad
    assert hash_bin("abc", 2**32) == 0xF20015AD
