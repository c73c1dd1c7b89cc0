"""On a GPU everything is where it must be, from the checkpoint to the last chunk; the GPU is pretended."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from handler.builders import build_language_model
from handler.engine.capacity import capacity_for
from handler.engine.messages import Done, Job
from handler.engine.process import _load
from handler.engine.spec import ModelSpec
from handler.lm.cpu_step import CpuDecoder
from handler.lm.decode_attention import MaskedAttention, attention_kernel
from handler.lm.fused_step import products_are_right
from handler.lm.sampling import Sampling
from handler.lm.static_step import StaticDecoder
from handler.musicgen import MusicGen
from handler.params import Clip
from tests.checkpoints import lm_checkpoint, lm_config
from tests.parity.models import GOLDENS, load
from tests.pretend_cuda import DEVICE, PretendCuda, pretend_cuda
from tests.unit.test_language_model import conditions_for, window_for
from tests.unit.test_scheduler import MIXED, Stage, alone, job
from tests.unit.test_static_step import finish

SPEC = ModelSpec(
    checkpoint=GOLDENS / "text_mono",
    hub_dir=GOLDENS / "hub",
    device="cuda",
    dtype=None,
    threads=None,
    max_concurrency=2,
    memory_budget=None,
    max_prompt_tokens=64,
    chunk_seconds=1.0,
)
HAS_TRITON = importlib.util.find_spec("triton") is not None


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PretendCuda]:
    """With attention the plain way: interpreted kernels take seconds a step."""
    monkeypatch.setattr("handler.lm.static_step.attention_kernel", lambda *_: MaskedAttention())
    with torch.inference_mode(), pretend_cuda() as mode:
        yield mode


@pytest.fixture
def gpu_with_kernels() -> Iterator[PretendCuda]:
    tried = (attention_kernel, products_are_right)
    for function in tried:
        function.cache_clear()
    with torch.inference_mode(), pretend_cuda() as mode:
        yield mode
    for function in tried:
        function.cache_clear()


def on_the_gpu(name: str, dtype: str = "float32") -> MusicGen:
    return MusicGen.get_pretrained(GOLDENS / name, "cuda", dtype, GOLDENS / "hub")


def jobs_for(model: MusicGen) -> list[Job]:
    """Of one, two and three rows, with all the audio that a model takes."""
    tone = torch.sin(torch.arange(int(3.5 * model.sample_rate)) * 0.05)[None]  # [1, T]
    melody = {} if model.melody is None else {"melody": tone, "melody_sample_rate": model.sample_rate}
    prompt = {"continuation": tone[:, :8000], "continuation_sample_rate": model.sample_rate}
    clips: list[dict[str, Any]] = [
        {"description": "happy rock", **melody},
        {"description": "jazz", **prompt},
        {"description": None},
        {"description": "loud", **melody},
    ]
    jobs = [
        job("short", 0.5, 1),
        job("continued", 1.2, 2, top_p=0.8),
        job("plain", 0.9, 3, cfg_coef=1.0),
        job("double", 0.7, 4, cfg_coef_beta=2.0),
    ]
    return [replace(wanted, clip=Clip(**clip)) for wanted, clip in zip(jobs, clips, strict=True)]


@pytest.mark.parametrize("name", ["text_mono", "melody", "style", "stereo_ac", "stereo_hf"])
def test_requests_together_have_the_audio_that_a_cpu_makes(name: str, gpu: PretendCuda) -> None:
    on_cpu = load(name)
    jobs = jobs_for(on_cpu)
    expected = {wanted.id: alone(on_cpu, wanted) for wanted in jobs}
    model = on_the_gpu(name)
    assert model.device == DEVICE
    stage = Stage(model, requests=4, rows=8)
    stage.submit(*jobs[:2], job("leaver", 30.0, 9))
    stage.rounds(9)
    stage.scheduler.cancel("leaver")
    stage.submit(*jobs[2:])
    stage.finish(*expected)
    for wanted, wav in expected.items():
        np.testing.assert_allclose(stage.wav(wanted), wav, atol=2e-6)
    [graph] = gpu.graphs
    assert len(graph.calls) > 100


def test_buckets_of_rows_are_graphs_of_their_own(gpu: PretendCuda) -> None:
    model = on_the_gpu("text_mono")
    expected = [alone(load("text_mono"), wanted) for wanted in MIXED[:2]]
    stage = Stage(model, deterministic=False)
    stage.submit(*MIXED[:2])
    stage.finish(*(wanted.id for wanted in MIXED[:2]))
    assert len(gpu.graphs) == 4  # 2, 4, 8 and 16 rows
    for wanted, wav in zip(MIXED[:2], expected, strict=True):
        np.testing.assert_allclose(stage.wav(wanted.id), wav, atol=2e-6)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrower_dtype_makes_music_of_nearly_the_same_logits(dtype: str, gpu: PretendCuda) -> None:
    name = "melody"  # it has every kind of input
    plain, narrow = load(name).lm, on_the_gpu(name, dtype).lm
    tokens = torch.randint(plain.card, (1, plain.num_codebooks, 12), generator=torch.Generator().manual_seed(0))
    wanted = jobs_for(load(name))[0]
    window = load(name).start(wanted.clip, wanted.params).next_window()
    assert window is not None
    [group] = window.conditions
    exact = plain.logits(plain(tokens, group).flatten(0, 1))
    logits = narrow.logits(narrow(tokens.to(DEVICE), group).flatten(0, 1)).cpu()
    error = (logits - exact).square().mean().sqrt() / exact.square().mean().sqrt()
    assert error < {"float16": 2e-3, "bfloat16": 2e-2}[dtype]
    stage = Stage(on_the_gpu(name, dtype))
    stage.submit(wanted)
    stage.finish(wanted.id)
    assert isinstance(stage.events[wanted.id][-1], Done)
    assert np.isfinite(stage.wav(wanted.id)).all()


def test_the_engine_is_ready_after_its_warm_up(gpu: PretendCuda) -> None:
    scheduler, card = _load(SPEC, lambda *_: None, lambda: None)
    assert (card.device, card.dtype, card.concurrency) == ("cuda:0", "float16", 2)
    assert isinstance(scheduler.decoder, StaticDecoder)


def test_what_is_prepared_or_decoded_beside_the_steps_touches_no_other_gpu(
    gpu: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    settled: list[tuple[str, torch.device]] = []
    monkeypatch.setattr(
        torch.cuda, "set_device", lambda device: settled.append((threading.current_thread().name, device))
    )
    stage = Stage(on_the_gpu("text_mono"))
    stage.submit(MIXED[0])
    stage.finish(MIXED[0].id)
    assert {name.partition("_")[0] for name, _ in settled} == {"prepare", "codec"}
    assert {device for _, device in settled} == {DEVICE}


def test_melodies_stems_find_memory_beside_the_keys_and_values(
    gpu: PretendCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (3 * 2**30 + 2**24, 2**33))
    rows = {
        name: capacity_for(on_the_gpu(name), replace(SPEC, max_concurrency=1000)).rows
        for name in ("text_mono", "melody")
    }
    assert rows["melody"] < 20 < rows["text_mono"]


class DoesNotFit:
    """A fused step that this GPU has not the room for."""

    most_rows = 16

    def bound_to(self, state: object, bucket: int) -> Callable[[], None]:
        def run() -> None:
            raise RuntimeError("out of resource: shared memory")

        return run


@pytest.mark.parametrize("cuda_graphs", [True, False])
def test_a_fused_step_that_does_not_fit_is_replaced_before_anybody_asks(
    cuda_graphs: bool, gpu: PretendCuda, caplog: pytest.LogCaptureFixture
) -> None:
    model, on_cpu = on_the_gpu("text_mono"), load("text_mono")
    window = on_cpu.start(Clip("jazz"), MIXED[0].params).next_window()
    assert window is not None
    [group] = window.conditions
    assert group.cross is not None
    sizes = (2, 4, window.positions, window.sequence.shape[1], group.cross.shape[1])
    decoder = StaticDecoder(model.lm, *sizes, cuda_graphs=cuda_graphs, fused=DoesNotFit())  # type: ignore[arg-type]
    assert "the plain one takes longer" in caplog.text
    plain = CpuDecoder(on_cpu.lm, *sizes)
    [actual], [expected] = finish(decoder, [decoder.join(window)]), finish(plain, [plain.join(window)])
    assert torch.equal(actual.cpu(), expected)


if HAS_TRITON:

    def test_a_replayed_fused_step_has_the_plain_decoders_tokens(
        gpu_with_kernels: PretendCuda, caplog: pytest.LogCaptureFixture
    ) -> None:
        options: dict[str, Any] = {"dim": 48, "card": 40}
        config = lm_config(options)
        lm, on_cpu = (build_language_model(lm_checkpoint(options)) for _ in range(2))
        lm.finalize(DEVICE, torch.float32)
        on_cpu.finalize(torch.device("cpu"), torch.float32)
        windows = [window_for(lm, conditions_for(config, i, 3 + i), 2 + i, Sampling(), i) for i in range(2)]
        decoder = StaticDecoder(lm, 2, 4, 30, 12, condition_length=6, deterministic=False)
        assert len(gpu_with_kernels.graphs) == 2  # of 2 and 4 rows
        assert caplog.text == ""  # no kernel was found wanting
        plain = CpuDecoder(on_cpu, 2, 4, 30, 12, condition_length=6)
        actual = finish(decoder, [decoder.join(window) for window in windows])
        expected = finish(plain, [plain.join(window) for window in windows])
        for tokens, wanted in zip(actual, expected, strict=True):
            assert torch.equal(tokens.cpu(), wanted)


class TestThePretendedGpu:
    """What it refuses, or the tests above would show nothing."""

    def test_tensors_of_two_devices_do_not_meet(self, gpu: PretendCuda) -> None:
        here = torch.ones(3, device="cuda")
        assert (here.device, here.cpu().device.type) == (DEVICE, "cpu")
        for meet in (lambda: here + torch.ones(3), lambda: torch.cat([here, torch.ones(3)])):
            with pytest.raises(RuntimeError, match="same device"):
                meet()
        torch.testing.assert_close((here * torch.tensor(2.0)).cpu(), torch.full((3,), 2.0))

    def test_numpy_does_not_take_them(self, gpu: PretendCuda) -> None:
        with pytest.raises(TypeError, match="numpy"):
            torch.ones(3, device="cuda").numpy()

    def test_copies_are_copies(self, gpu: PretendCuda) -> None:
        host = torch.zeros(3)
        there = host.to("cuda")
        there += 1
        assert float(host.sum()) == 0.0
        assert there[:2].is_cuda
        assert not host.is_cuda

    def test_no_value_is_looked_at_in_a_capture(self, gpu: PretendCuda) -> None:
        x = torch.ones(3, device="cuda")
        for look in (
            lambda: x.sum().item(),
            lambda: bool(x[0] > 0),
            lambda: x.cpu(),
            lambda: torch.tensor([1], device="cuda"),
            lambda: torch.ones(3).to("cuda"),
            lambda: x[x > 0],
            lambda: x.copy_(torch.ones(3)),
        ):
            look()
            with (
                pytest.raises(RuntimeError, match="stream is capturing"),
                torch.cuda.graph(torch.cuda.CUDAGraph(), None, torch.cuda.Stream(), capture_error_mode="global"),
            ):
                look()

    def test_a_replay_reads_and_writes_where_the_capture_did(self, gpu: PretendCuda) -> None:
        x, total, factor = torch.ones(3, device="cuda"), torch.zeros(3, device="cuda"), 2.0
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, None, torch.cuda.Stream(), capture_error_mode="global"):
            doubled = x * factor
            total += doubled
        factor = 100.0
        x.fill_(5.0)
        graph.replay()
        assert total.cpu().tolist() == [12.0] * 3
        assert doubled.cpu().tolist() == [10.0] * 3
