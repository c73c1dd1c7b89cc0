"""The fused decode step gives what the plain decoder gives; interpreted on a CPU, where Triton is installed."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handler import linear as linear_module
from handler.builders import build_language_model
from handler.lm.cpu_step import CpuDecoder
from handler.lm.decoder import Decoder, Guidance, Slot, Window
from handler.lm.fused_step import FusedStep, can_fuse, products_are_right
from handler.lm.sampling import Sampling, uniform_draws
from handler.lm.static_step import StaticDecoder, sample
from handler.lm.step_state import RequestSettings
from tests.checkpoints import lm_checkpoint, lm_config
from tests.unit.test_language_model import PREPEND, conditions_for, window_for

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_TRITON = importlib.util.find_spec("triton") is not None

VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "published": ({"dim": 48, "num_heads": 4, "card": 40}, {}),
    "biases": ({"bias_ff": True, "bias_attn": True, "bias_proj": True, "activation": "relu"}, {}),
    "prepend": ({"kv_repeat": 2}, {"fuser": PREPEND}),
}

SAMPLINGS = [
    Sampling(top_k=250),
    Sampling(top_k=7, temperature=0.7),
    Sampling(top_k=0),
    Sampling(top_p=0.6),
    Sampling(top_p=1.5),
    Sampling(use_sampling=False),
    Sampling(top_k=1),
]


def finish(decoder: Decoder, windows: list[Window]) -> list[Tensor]:
    slots = [decoder.join(window) for window in windows]
    while not all(slot.done for slot in slots):
        decoder.step()
    return [decoder.leave(slot) for slot in slots]


if HAS_TRITON:

    @pytest.fixture(autouse=True)
    def _dense_weights(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
        """Weights as they are on a GPU: not packed for a CPU."""
        monkeypatch.setattr(linear_module, "can_prepack", lambda dtype: False)
        with torch.inference_mode():
            yield

    @pytest.mark.parametrize("name", VARIANTS)
    def test_mixed_requests_have_the_plain_decoders_tokens(name: str) -> None:
        from handler.lm.triton_attention import TritonAttention

        lm_options, sections = VARIANTS[name]
        lm = build_language_model(lm_checkpoint(lm_options, **sections))
        lm.finalize(DEVICE, torch.float32)
        assert can_fuse(lm.config)
        config = lm_config(lm_options, **sections)
        windows = [
            window_for(lm, conditions_for(config, i, 3 + i), 2 + i, sampling, i)
            for i, sampling in enumerate(SAMPLINGS[1:3])
        ]
        [group] = windows[0].conditions
        three = replace(group, rows=3, prefix=torch.cat([group.prefix, group.prefix[:1]]))
        windows.append(replace(windows[0], conditions=[three], guidance=Guidance(3.0, 2.0)))
        kernel = TritonAttention(DEVICE, programs=200)
        decoder = StaticDecoder(lm, 4, 8, 30, 12, condition_length=6, kernel=kernel, fused=FusedStep(lm, kernel))
        plain = CpuDecoder(lm, 4, 8, 30, 12, condition_length=6)
        for actual, expected in zip(finish(decoder, windows), finish(plain, windows), strict=True):
            assert torch.equal(actual, expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    @pytest.mark.parametrize(("count", "inputs", "outputs"), [(1, 1024, 24), (5, 300, 70), (16, 70, 2050)])
    def test_a_product_takes_in_the_norm_before_it_and_what_follows(
        count: int, inputs: int, outputs: int, dtype: torch.dtype
    ) -> None:
        from handler.lm.triton_linear import linear

        generator = torch.Generator(DEVICE).manual_seed(0)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=DEVICE)

        # Far from zero in the mean, as a residual stream can be.
        x, weight = 3 * random(count, inputs) + 20, random(outputs, inputs) / inputs**0.5
        bias, residual, gain, shift = random(outputs), random(count, outputs), 1 + 0.2 * random(inputs), random(inputs)
        norm = nn.LayerNorm(inputs, device=DEVICE)
        norm.weight.copy_(gain)
        norm.bias.copy_(shift)
        norm.to(dtype)
        x, weight, bias, residual = (y.to(dtype) for y in (x, weight, bias, residual))
        tolerance = 2e-5 if dtype == torch.float32 else 1e-2
        normed = F.layer_norm(x.float(), (inputs,), norm.weight.float(), norm.bias.float())
        product = normed @ weight.float().T
        for activation, function in (("", nn.Identity()), ("gelu", F.gelu), ("relu", F.relu)):
            out = torch.empty_like(residual)
            linear(x, weight, None, out, norm, activation)
            torch.testing.assert_close(out.float(), function(product), atol=tolerance, rtol=tolerance)
        out = residual.clone()
        linear(x, weight, bias, out, adds=True)
        wanted = residual.float() + x.float() @ weight.float().T + bias.float()
        torch.testing.assert_close(out.float(), wanted, atol=10 * tolerance, rtol=tolerance)

    def test_the_products_are_tried_before_they_are_trusted() -> None:
        assert products_are_right(DEVICE, torch.float32)

    def test_each_request_draws_by_its_own_settings() -> None:
        from handler.lm.step_state import Plan, StepState
        from handler.lm.triton_tokens import sample as triton_sample

        codebooks, card, count, tries = 4, 300, len(SAMPLINGS), 4
        generator = torch.Generator(DEVICE).manual_seed(0)
        settings = RequestSettings(count + 1, card, DEVICE)
        plan = Plan(count, count, DEVICE)
        window = Window(torch.full((codebooks, tries + 1), -1), 1, [], Guidance(), Sampling(), torch.empty(0))
        slots = [
            Slot(i, range(i, i + 1), replace(window, sampling=sampling), 0) for i, sampling in enumerate(SAMPLINGS)
        ]
        for slot in slots:
            settings.write(slot)
        plan.write(slots)
        draws = torch.stack([uniform_draws(i, tries + 1, codebooks) for i in range(count + 1)]).to(DEVICE)
        sequences = torch.full((count + 1, codebooks, tries + 1), -1, device=DEVICE)
        sequences[2, 1, 2] = 33  # known
        empty = torch.empty(0, device=DEVICE)
        state = StepState(sequences, draws, None, empty, None, None, settings, plan)  # type: ignore[arg-type]
        arrived = torch.zeros(count, dtype=torch.int32, device=DEVICE)
        for step in range(1, tries + 1):
            # Rounded, so that there are ties at every bound.
            logits = (3 * torch.randn(count, codebooks, card, generator=generator, device=DEVICE)).round(decimals=1)
            wanted = sample(logits, settings, plan.requests, draws[:count, step])
            triton_sample(logits.flatten(1), state, arrived, count)
            if step == 2:
                wanted[2, 1] = 33
            assert not settings.diverged.any()
            assert torch.equal(sequences[:count, :, step], wanted)
            assert settings.step.tolist() == [step] * count + [0]
            assert not arrived.any()
        for place, value in ((1, float("nan")), (3, float("inf")), (4, float("-inf"))):
            logits[place, codebooks - 1, card - 1] = value
        settings.last_step.fill_(tries)
        triton_sample(logits.flatten(1), state, arrived, count)
        assert settings.diverged.nonzero().flatten().tolist() == [1, 3, 4]
