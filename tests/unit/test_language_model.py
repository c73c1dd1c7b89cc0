"""Every option of `transformer_lm` means what it means in audiocraft, in one pass and step by step."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from handler.builders import build_fuser, build_language_model
from handler.conditioners.fuser import Condition
from handler.lm.conditions import FusedConditions
from handler.lm.cpu_step import CpuDecoder
from handler.lm.decoder import UNKNOWN, Guidance, Window
from handler.lm.model import LanguageModel
from handler.lm.sampling import Sampling, uniform_draws
from handler.quantized import can_quantize
from tests.checkpoints import lm_checkpoint, lm_config, lm_state
from tests.unit import reference

NEEDS_INT8 = pytest.mark.skipif(not can_quantize(), reason="this CPU cannot multiply 8-bit integers exactly")
PREPEND = {"cross": [], "prepend": ["description"], "sum": [], "input_interpolate": []}

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": ({}, {}),
    "prepend": ({}, {"fuser": PREPEND}),
    "biases": ({"bias_ff": True, "bias_attn": True, "bias_proj": True}, {}),
    "relu": ({"activation": "relu"}, {}),
    "post_norm": ({"norm_first": False}, {}),
    "rope": ({"positional_embedding": "rope"}, {}),
    "sin_rope": ({"positional_embedding": "sin_rope", "positional_scale": 0.7, "max_period": 500}, {}),
    "xpos": ({"positional_embedding": "rope", "xpos": True}, {}),
    "qk_layer_norm": ({"qk_layer_norm": True, "qk_layer_norm_cross": True, "bias_attn": True}, {}),
    "qk_layer_norm_rope": ({"qk_layer_norm": True, "positional_embedding": "rope"}, {}),
    "layer_scale": ({"layer_scale": 0.1}, {}),
    "layer_scale_post_norm": ({"layer_scale": 0.1, "norm_first": False}, {}),
    "kv_repeat": ({"kv_repeat": 2}, {"fuser": PREPEND}),
    "kv_repeat_rope": ({"kv_repeat": 4, "positional_embedding": "rope"}, {"fuser": PREPEND}),
    "past_context": ({"past_context": 5, "memory_efficient": False, "custom": True}, {}),
    "past_context_prepend": ({"past_context": 9, "positional_embedding": "rope"}, {"fuser": PREPEND}),
    "attention_as_float32": ({"attention_as_float32": True}, {}),
    "parallel": ({}, {"codebooks_pattern": {"modeling": "parallel"}}),
    "unroll": ({}, {"codebooks_pattern": {"modeling": "unroll"}}),
    "coarse_first": ({}, {"codebooks_pattern": {"modeling": "coarse_first"}}),
    "musiclm": ({}, {"codebooks_pattern": {"modeling": "musiclm"}}),
}


def built(name: str) -> tuple[LanguageModel, dict[str, Any], dict[str, Tensor]]:
    lm_options, sections = VARIANTS[name]
    lm = build_language_model(lm_checkpoint(lm_options, **sections))
    lm.finalize(torch.device("cpu"), torch.float32)
    config = lm_config(lm_options, **sections)
    return lm, config, lm_state(config)


def conditions_for(config: dict[str, Any], seed: int = 1, length: int = 6) -> FusedConditions:
    """A conditional and a null row, the way the config fuses them."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(1, length, config["transformer_lm"]["dim"], generator=generator)
    if config["fuser"]["cross"]:
        return FusedConditions(2, torch.zeros(2, 0, text.shape[2]), text)
    return FusedConditions(2, torch.cat([text, torch.zeros_like(text)]))


def guided_reference(config: dict[str, Any], state: dict[str, Tensor], sequence: Tensor, conditions: Any) -> Tensor:
    """Logits `[S, K, card]` under guidance with coefficient 3, by the plain reference."""
    rows = []
    for row in range(2):
        cross = conditions.cross[0] if conditions.cross is not None and row == 0 else None
        if cross is None and config["fuser"]["cross"]:
            cross = torch.zeros(3, config["transformer_lm"]["dim"])  # however many zeros: the same
        rows.append(reference.logits(config, state, sequence, conditions.prefix[row], cross))
    return rows[1] + 3.0 * (rows[0] - rows[1])


def window_for(lm: LanguageModel, conditions: FusedConditions, frames: int, sampling: Sampling, seed: int) -> Window:
    pattern = lm.pattern_provider.get(frames)
    unknown = torch.full((1, lm.num_codebooks, frames), UNKNOWN)
    sequence, _ = pattern.build(unknown, lm.special_token)
    draws = uniform_draws(seed, pattern.num_steps - 1, lm.num_codebooks)
    return Window(sequence[0], 1, [conditions], Guidance(3.0), sampling, draws)


def with_rows(window: Window, rows: int) -> Window:
    """The same without guidance (1 row) or with double guidance (3)."""
    [group] = window.conditions
    fused = FusedConditions(rows, torch.zeros(rows, 0, group.prefix.shape[2]), group.cross)
    return replace(window, conditions=[fused], guidance=Guidance(3.0, 1.5))


def run(lm: LanguageModel, windows: list[Window]) -> list[Tensor]:
    sources = [group.cross for window in windows for group in window.conditions if group.cross is not None]
    decoder = CpuDecoder(
        lm,
        len(windows),
        sum(w.rows for w in windows),
        max(w.positions for w in windows),
        max(w.sequence.shape[1] for w in windows),
        max((source.shape[1] for source in sources), default=0),
    )
    slots = [decoder.join(window) for window in windows]
    while not all(slot.done for slot in slots):
        decoder.step()
    return [decoder.leave(slot) for slot in slots]


@pytest.mark.parametrize("name", VARIANTS)
def test_one_pass_and_decode_steps_agree_with_the_plain_reference(name: str) -> None:
    lm, config, state = built(name)
    conditions = conditions_for(config)
    frames = 9
    with torch.inference_mode():
        [sequence] = run(lm, [window_for(lm, conditions, frames, Sampling(use_sampling=False), seed=0)])
        rows = lm.logits(lm(sequence[None], conditions).flatten(0, 1)).unflatten(0, (2, -1))  # [2, S, K, card]
    guided = rows[1] + 3.0 * (rows[0] - rows[1])
    expected = guided_reference(config, state, sequence, conditions)
    torch.testing.assert_close(guided, expected, atol=2e-4, rtol=1e-4)
    # What the steps chose, one vector at a time, is what the one pass finds likeliest wherever a code was free.
    free = sequence[:, 1:] != lm.special_token
    best = expected[:-1].argmax(-1).T  # [K, S - 1]
    torch.testing.assert_close(sequence[:, 1:][free], best[free])


def test_published_parameter_names_of_torchs_own_attention_load_too() -> None:
    checkpoint = lm_checkpoint({"custom": False, "memory_efficient": False, "bias_attn": True})
    for name in list(checkpoint.state):
        if "attn." in name or "cross_attention." in name:
            head, tail = name.rsplit("attn." if "attn." in name else "cross_attention.", 1)
            middle = name.removeprefix(head).removesuffix(tail)
            checkpoint.state[f"{head}{middle}mha.{tail}"] = checkpoint.state.pop(name)
    lm = build_language_model(checkpoint)
    lm.finalize(torch.device("cpu"), torch.float32)
    config = lm_config({"bias_attn": True})
    conditions = conditions_for(config)
    sequence = torch.randint(0, 48, (4, 7), generator=torch.Generator().manual_seed(3))
    row = lm.logits(lm(sequence[None], conditions)[0])
    assert conditions.cross is not None
    expected = reference.logits(config, lm_state(config), sequence, conditions.prefix[0], conditions.cross[0])
    torch.testing.assert_close(row, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.int8, marks=NEEDS_INT8)])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_request_has_the_same_tokens_whoever_runs_beside_it(dtype: torch.dtype, threads: int) -> None:
    # Wide enough for oneDNN's kernels to block, and for the inner sums to be long.
    lm = build_language_model(lm_checkpoint({"dim": 256, "num_heads": 4, "card": 512, "num_layers": 2}))
    lm.finalize(torch.device("cpu"), dtype)
    config = lm_config({"dim": 256})
    windows = [
        window_for(lm, conditions_for(config, seed, length=3 + seed), 12 + 7 * seed, Sampling(top_k=250), seed)
        for seed in range(5)
    ]
    windows += [with_rows(windows[1], 1), with_rows(windows[2], 3)]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.inference_mode():
            alone = [run(lm, [window])[0] for window in windows]
            together = run(lm, windows)
            reordered = run(lm, windows[::-1])[::-1]
    finally:
        torch.set_num_threads(before)
    for a, b, c in zip(alone, together, reordered, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.05), pytest.param(torch.int8, 0.05, marks=NEEDS_INT8)])
def test_logits_of_a_narrower_dtype_stay_near_those_of_float32(dtype: torch.dtype, bound: float) -> None:
    checkpoint = lm_checkpoint({"dim": 256, "num_heads": 4, "card": 512, "num_layers": 6})
    conditions = conditions_for(lm_config({"dim": 256}))
    sequence = torch.randint(0, 512, (1, 4, 40), generator=torch.Generator().manual_seed(3))
    logits = []
    for each in (torch.float32, dtype):
        lm = build_language_model(checkpoint)
        lm.finalize(torch.device("cpu"), each)
        with torch.inference_mode():
            logits.append(lm.logits(lm(sequence, conditions).flatten(0, 1)))
    error = (logits[1] - logits[0]).std() / logits[0].std()
    print(f"{dtype}: logits differ from those of float32 by {error:.4f} of their standard deviation")
    assert error < bound


def test_summed_and_interpolated_conditions_reach_every_step() -> None:
    fuser_config: dict[str, list[str]] = {"cross": [], "prepend": ["a"], "sum": ["b"], "input_interpolate": ["c"]}
    lut = {"model": "lut", "lut": {"n_bins": 64, "dim": 16, "tokenizer": "noop"}}
    sections: dict[str, Any] = {"fuser": fuser_config, "conditioners": {"a": lut, "b": lut, "c": lut}}
    checkpoint = lm_checkpoint({}, **sections)
    lm = build_language_model(checkpoint)
    lm.finalize(torch.device("cpu"), torch.float32)
    generator = torch.Generator().manual_seed(5)
    rows = [
        {name: Condition(torch.randn(1, n, 32, generator=generator)) for name, n in (("a", 3), ("b", 1), ("c", 4))}
        for _ in range(2)
    ]
    pattern = lm.pattern_provider.get(9)
    fused = build_fuser(checkpoint.config).fuse(rows, pattern.num_steps)
    assert fused.prefix.shape == (2, 3, 32)
    with torch.inference_mode():
        [sequence] = run(lm, [window_for(lm, fused, 9, Sampling(use_sampling=False), 0)])
    config = lm_config({}, **sections)
    state = lm_state(config)
    logits = []
    for row in rows:
        a, b, c = (row[name].embedding[0] for name in "abc")
        # In the order a, b, c: b is added to a's prefix and the steps, c is spread over both.
        length = 3 + pattern.num_steps
        spread = c[(torch.arange(length) * len(c) / length).long()]
        logits.append(reference.logits(config, state, sequence, a + b + spread[:3], None, b + spread[3:]))
    expected = logits[1] + 3.0 * (logits[0] - logits[1])
    free = sequence[:, 1:] != lm.special_token
    assert torch.equal(sequence[:, 1:][free], expected[:-1].argmax(-1).T[free])
