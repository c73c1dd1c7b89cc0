"""What an `xp.cfg` may say, and what becomes of it."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from handler.builders import build_conditioners, build_fuser, build_language_model
from handler.checkpoint import Checkpoint, read_checkpoint
from handler.conditioners.lut import hash_bin, lemmas
from handler.errors import CheckpointError
from tests.checkpoints import lm_checkpoint

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"

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


ROPES: list[dict[str, Any]] = [
    {"positional_embedding": "rope"},
    {"positional_embedding": "sin_rope", "max_period": 500},
    {"positional_embedding": "rope", "xpos": True},
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("lm", ROPES)
def test_rotary_buffers_that_a_file_lacks_are_computed_and_rounded_as_the_file_is(
    lm: dict[str, Any], dtype: torch.dtype
) -> None:
    checkpoint = lm_checkpoint(lm)
    state = checkpoint.state
    for name in list(state):
        value = state.pop(name)
        if ".rope." not in name:
            state[name] = value.to(dtype)
    rope = build_language_model(checkpoint).transformer.rope
    assert rope is not None
    exponent = torch.tensor([0, 2, 4, 6]) / 8  # of a head of 8
    frequencies = float(lm.get("max_period", 10_000)) ** -exponent
    torch.testing.assert_close(rope.frequencies, frequencies.to(dtype))
    if rope.xpos is not None:
        rates = torch.tensor([(i / 4 + 0.4) / 1.4 for i in range(4)])
        torch.testing.assert_close(rope.xpos.decay_rates, rates.to(dtype))


def test_rotary_buffers_are_the_file_s_own_where_it_has_them_and_a_layer_s_where_that_has() -> None:
    checkpoint = lm_checkpoint(ROPES[0])
    own = checkpoint.state["transformer.rope.frequencies"] * 2
    checkpoint.state["transformer.rope.frequencies"] = own
    layer = checkpoint.state["transformer.layers.0.self_attn.rope.frequencies"] * 3
    checkpoint.state["transformer.layers.0.self_attn.rope.frequencies"] = layer
    rope = build_language_model(checkpoint).transformer.rope
    assert rope is not None
    assert torch.equal(rope.frequencies, own)
    del checkpoint.state["transformer.rope.frequencies"]
    rope = build_language_model(checkpoint).transformer.rope
    assert rope is not None
    assert torch.equal(rope.frequencies, layer)


@pytest.mark.parametrize("name", ["melody", "style"])
def test_buffers_of_conditioners_that_follow_from_the_config_may_be_absent(name: str) -> None:
    checkpoint = read_checkpoint(GOLDENS / name / "state_dict.bin")
    assert isinstance(checkpoint, Checkpoint)
    whole = build_conditioners(checkpoint, lambda auxiliary: GOLDENS / "hub" / auxiliary.rpartition("/")[2])
    optional = ("window", "inited", "cluster_size", "embed_avg", "num_batches_tracked")
    absent = [key for key in checkpoint.state if key.endswith(optional)]
    assert absent
    for key in absent:
        del checkpoint.state[key]
    rebuilt = build_conditioners(checkpoint, lambda auxiliary: GOLDENS / "hub" / auxiliary.rpartition("/")[2])
    for key, value in whole.state_dict().items():
        if key.endswith("window"):
            torch.testing.assert_close(rebuilt.state_dict()[key], value, atol=3e-4, rtol=0)  # the file's is float16
        elif not key.endswith(optional):
            assert torch.equal(rebuilt.state_dict()[key], value)
    running = [key for key in checkpoint.state if key.endswith("running_mean")]
    for key in running:  # is learnt
        del checkpoint.state[key]
        with pytest.raises(CheckpointError, match="running_mean"):
            build_conditioners(checkpoint, lambda auxiliary: GOLDENS / "hub" / auxiliary.rpartition("/")[2])
