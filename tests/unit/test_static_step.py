"""The decode step at fixed addresses gives what the plain decoder gives, whoever joins and leaves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from handler.errors import ModelDivergedError
from handler.lm.cpu_step import CpuDecoder
from handler.lm.decoder import Decoder, Slot, Window
from handler.lm.graphs import Addresses
from handler.lm.model import LanguageModel
from handler.lm.sampling import Sampling
from handler.lm.static_step import StaticDecoder, bucket_sizes, decoder_for
from handler.musicgen import MusicGen
from handler.params import Clip, GenerationParams
from tests.parity.models import load
from tests.unit.test_language_model import VARIANTS, built, conditions_for, window_for

REQUESTS, ROWS, POSITIONS, STEPS = 8, 16, 400, 64


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


def window_of(model: MusicGen, clip: Clip, **params: object) -> Window:
    wanted = GenerationParams(**{"duration": 0.3, "seed": 1, **params})  # type: ignore[arg-type]
    window = model.start(clip, wanted).next_window()
    assert window is not None
    return window


@cache
def mixed_windows(name: str) -> list[Window]:
    """Windows of 1, 2 and 3 rows, greedy and sampled in every way, of several lengths, with and without a prompt."""
    model = load(name)
    tone = torch.sin(torch.arange(int(3.5 * model.sample_rate)) * 0.05)[None]  # [1, T]
    rate = model.sample_rate
    melody = {} if model.melody is None else {"melody": tone, "melody_sample_rate": rate}
    prompt = {"continuation": tone[:, : rate // 5], "continuation_sample_rate": rate}
    return [
        window_of(model, Clip("happy rock", **melody)),  # type: ignore[arg-type]
        window_of(model, Clip(None), duration=0.5, seed=2, top_k=0),
        window_of(model, Clip("an 80s driving pop song", **melody), duration=0.2, cfg_coef_beta=2.0, seed=3),  # type: ignore[arg-type]
        window_of(model, Clip("slow"), cfg_coef=1.0, duration=0.6, use_sampling=False),
        window_of(model, Clip("loud", **prompt), duration=0.7, seed=4, temperature=0.8, top_k=20),  # type: ignore[arg-type]
        window_of(model, Clip("a b c d e f g"), duration=0.4, seed=5, top_p=0.7),
        window_of(model, Clip("two"), duration=0.4, seed=6, two_step_cfg=True, top_k=10**6),
    ]


def longest_condition(windows: list[Window]) -> int:
    crosses = [group.cross for window in windows for group in window.conditions if group.cross is not None]
    return max((cross.shape[1] for cross in crosses), default=0)


def finish(decoder: Decoder, slots: list[Slot]) -> list[Tensor]:
    while not all(slot.done for slot in slots):
        decoder.step()
    return [decoder.leave(slot) for slot in slots]


def plain(lm: LanguageModel, windows: list[Window]) -> list[Tensor]:
    decoder = CpuDecoder(lm, REQUESTS, ROWS, POSITIONS, STEPS, longest_condition(windows))
    return finish(decoder, [decoder.join(window) for window in windows])


def static(lm: LanguageModel, windows: list[Window], deterministic: bool = True) -> StaticDecoder:
    additive = any(group.additive is not None for window in windows for group in window.conditions)
    length = longest_condition(windows) + 3
    return StaticDecoder(lm, REQUESTS, ROWS, POSITIONS, STEPS, length, additive, deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["text_mono", "melody", "style"])
def test_mixed_requests_have_the_plain_decoders_tokens(name: str, deterministic: bool) -> None:
    lm, windows = load(name).lm, mixed_windows(name)
    decoder = static(lm, windows, deterministic=deterministic)
    for actual, expected in zip(finish(decoder, [decoder.join(w) for w in windows]), plain(lm, windows), strict=True):
        assert torch.equal(actual, expected)


def test_the_step_marks_the_request_whose_logits_are_not_finite_and_no_other() -> None:
    lm = load("text_mono").lm
    windows = [window for window in mixed_windows("text_mono") if window.rows == 2][:2]
    decoder = static(lm, windows)
    sound, bad = decoder.join(windows[0]), decoder.join(windows[1])
    decoder.step()
    decoder.require_finite(bad)
    decoder.state.settings.coef[bad.index] = 3e38
    decoder.step()
    with pytest.raises(ModelDivergedError, match="not finite"):
        decoder.require_finite(bad)
    decoder.require_finite(sound)
    decoder.leave(bad)
    decoder.require_finite(decoder.join(windows[1]))


@pytest.mark.parametrize("deterministic", [True, False])
def test_requests_join_and_leave_midway_and_disturb_nobody(deterministic: bool) -> None:
    lm, windows = load("text_mono").lm, mixed_windows("text_mono")
    expected = plain(lm, windows)
    decoder = static(lm, windows, deterministic=deterministic)
    waiting = list(enumerate(windows * 2))
    running: list[tuple[int, Slot]] = []
    steps = 0
    while waiting or running:
        if waiting and steps % 3 == 0 and decoder.has_room(waiting[0][1]):
            number, window = waiting.pop(0)
            running.append((number, decoder.join(window)))
        if steps == 20:  # one is cancelled, and its rows are taken by others
            decoder.leave(running.pop(0)[1])
        decoder.step()
        steps += 1
        # A finished window may stay a while before it leaves.
        for number, slot in [pair for pair in running if pair[1].done and steps % 5 == 0]:
            assert torch.equal(decoder.leave(slot), expected[number % len(windows)])
            running.remove((number, slot))


def test_what_free_rows_hold_changes_nothing() -> None:
    lm, windows = load("text_mono").lm, mixed_windows("text_mono")[:1]
    decoder = static(lm, windows)
    slot = decoder.join(windows[0])
    others = [row for row in range(ROWS) if row not in slot.rows]
    decoder.cache.keys[:, others] = decoder.cache.values[:, others] = float("nan")
    assert torch.equal(finish(decoder, [slot])[0], plain(lm, windows)[0])


@pytest.mark.parametrize("name", VARIANTS)
def test_every_kind_of_transformer_has_the_plain_decoders_tokens(name: str) -> None:
    lm, config, _ = built(name)
    windows = [window_for(lm, conditions_for(config, seed, 3 + seed), 8 + seed, Sampling(), seed) for seed in range(3)]
    decoder = static(lm, windows, deterministic=False)
    for actual, expected in zip(finish(decoder, [decoder.join(w) for w in windows]), plain(lm, windows), strict=True):
        assert torch.equal(actual, expected)


def test_added_conditions_reach_every_step() -> None:
    lm, config, _ = built("published")
    windows = []
    for seed in range(3):
        window = window_for(lm, conditions_for(config, seed), 9, Sampling(), seed)
        [group] = window.conditions
        added = torch.randn(2, window.sequence.shape[1], lm.config.dim, generator=torch.Generator().manual_seed(seed))
        windows.append(replace(window, conditions=[replace(group, additive=added)]))
    decoder = static(lm, windows)
    for actual, expected in zip(finish(decoder, [decoder.join(w) for w in windows]), plain(lm, windows), strict=True):
        assert torch.equal(actual, expected)


def test_a_condition_it_was_not_made_for_is_refused_by_name() -> None:
    lm, config, _ = built("published")
    window = window_for(lm, conditions_for(config, length=6), 9, Sampling(), 0)
    short = StaticDecoder(lm, REQUESTS, ROWS, POSITIONS, STEPS, condition_length=5)
    with pytest.raises(ValueError, match="6 vectors, and this decoder holds 5; raise its `condition_length`"):
        short.join(window)
    adding = StaticDecoder(lm, REQUESTS, ROWS, POSITIONS, STEPS, condition_length=6, additive=True)
    with pytest.raises(ValueError, match="`additive`"):
        adding.join(window)


def test_a_cpu_keeps_the_plain_decoder() -> None:
    lm, _, _ = built("published")
    assert type(decoder_for(lm, 2, 4, 20, 20, condition_length=5)) is CpuDecoder


class HostLooks(TorchDispatchMode):
    """Counts what would make a captured step wrong or impossible: values read on the host, or sent from it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "lift_fresh", "masked_select", "equal", "is_nonzero"):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_never_waits_for_the_device(name: str) -> None:
    lm, config, _ = built(name)
    window = window_for(lm, conditions_for(config), 9, Sampling(top_p=0.5), 0)
    decoder = static(lm, [window])
    decoder.join(window)
    decoder.step()  # this one writes which rows take part
    with HostLooks() as looks:
        decoder.step()
    assert looks.found == []


def test_buckets_double_up_to_the_rows_there_are() -> None:
    assert bucket_sizes(128) == [2, 4, 8, 16, 32, 64, 128]
    assert bucket_sizes(20) == [2, 4, 8, 16, 20]
    assert bucket_sizes(3) == [2, 3]
    assert bucket_sizes(1) == [1]


def test_a_tensor_replaced_after_the_capture_is_named() -> None:
    held = {"sequences": torch.zeros(2, 3), "draws": torch.zeros(2)}
    captured = Addresses(held)
    held["draws"].fill_(1.0)
    captured.check(held)
    with pytest.raises(RuntimeError, match=r"`sequences` is .*int64 \[5\].*float32 \[2, 3\].*`cuda_graphs: false`"):
        captured.check({**held, "sequences": torch.zeros(5, dtype=torch.long)})
