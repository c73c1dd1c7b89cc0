"""The offline API: what users of audiocraft expect, and clear errors."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from handler.errors import CheckpointError, RequestError
from handler.musicgen import MusicGen
from handler.params import Clip, GenerationParams
from tests.parity.models import D2, GOLDENS, load

PROMPTS = [*D2, None, "jazz", "a b c d e f g h", "", "slow piano", "loud"]


@pytest.fixture
def model() -> Iterator[MusicGen]:
    model = load("text_mono")
    yield model
    model.max_duration = 30.0
    model.set_custom_progress_callback(None)


def test_eight_prompts_together_sound_as_each_alone(model: MusicGen) -> None:
    model.set_generation_params(duration=1.5, seed=1234)
    wav, codes = model.generate(PROMPTS, return_tokens=True)
    for i, prompt in enumerate(PROMPTS):
        wav_alone, codes_alone = model.generate([prompt], return_tokens=True)
        assert torch.equal(codes_alone[0], codes[i])
        assert torch.equal(wav_alone[0], wav[i])


def jazz(model: MusicGen, **params: float) -> torch.Tensor:
    model.set_generation_params(**params)
    wav = model.generate(["jazz"])
    assert isinstance(wav, torch.Tensor)
    return wav


def test_a_seed_decides_the_music(model: MusicGen) -> None:
    first = jazz(model, duration=1.0, seed=5)
    assert torch.equal(first, jazz(model, duration=1.0, seed=5))
    assert not torch.equal(first, jazz(model, duration=1.0, seed=6))
    assert not torch.equal(jazz(model, duration=1.0), jazz(model, duration=1.0))


def test_unconditional_samples_differ_under_one_seed(model: MusicGen) -> None:
    model.set_generation_params(duration=1.0, seed=5)
    _, codes = model.generate_unconditional(2, return_tokens=True)
    assert not torch.equal(codes[0], codes[1])
    assert torch.equal(codes[:1], model.generate([None], return_tokens=True)[1])


def test_shapes_and_lengths(model: MusicGen) -> None:
    assert (model.sample_rate, model.frame_rate, model.audio_channels, model.max_duration) == (32000, 50, 1, 30.0)
    assert model.conditioners == ("description",)
    model.set_generation_params(duration=0.77, seed=0)
    wav, codes = model.generate(["jazz", "rock"], return_tokens=True)
    assert wav.dtype == torch.float32
    assert wav.shape == (2, 1, 38 * 640)
    assert codes.dtype == torch.int64
    assert codes.shape == (2, 4, 38)
    assert 0 <= codes.min() <= codes.max() < model.lm.card


def test_progress_reaches_its_end_in_every_window(model: MusicGen) -> None:
    seen: list[tuple[int, int]] = []
    model.max_duration = 1.0
    model.set_custom_progress_callback(lambda done, total: seen.append((done, total)))
    model.set_generation_params(duration=2.3, extend_stride=0.5, seed=0)
    model.generate(["jazz", "rock"])
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1][0] == seen[-1][1]
    assert len({total for _, total in seen}) == 1


def test_a_progress_bar_goes_to_the_terminal(model: MusicGen, capsys: pytest.CaptureFixture[str]) -> None:
    model.set_generation_params(duration=0.5, seed=0)
    model.generate(["jazz"], progress=True)
    assert "100%" in capsys.readouterr().err


def test_a_callback_can_stop_a_generation(model: MusicGen) -> None:
    def stop(done: int, total: int) -> None:
        if done == 7:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        model.generate_clip(Clip("jazz"), GenerationParams(duration=5.0, seed=0), stop)


def test_a_window_may_be_shortened_and_not_stretched(model: MusicGen) -> None:
    model.max_duration = 4.0
    with pytest.raises(ValueError, match="at most the model's 30"):
        model.max_duration = 31.0
    # The default stride of 18 s does not fit a window of 4 s: it adapts.
    assert jazz(model, duration=5.0, seed=0).shape == (1, 1, 5 * 32000)


@pytest.mark.parametrize(
    ("params", "field"),
    [
        ({"duration": 0}, "duration"),
        ({"duration": float("nan")}, "duration"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 1.5}, "top_p"),
        ({"temperature": -0.1}, "temperature"),
        ({"cfg_coef": float("inf")}, "cfg_coef"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
    ],
)
def test_values_out_of_bounds_are_named(model: MusicGen, params: dict[str, float], field: str) -> None:
    with pytest.raises(RequestError, match=f"^{field}: ") as error:
        model.set_generation_params(**params)
    assert error.value.field == field


def test_what_makes_no_sense_for_the_model_is_named(model: MusicGen) -> None:
    model.set_generation_params(duration=1.0, seed=0)
    wav = torch.zeros(1, 1, 32000)
    with pytest.raises(RequestError, match=r"^continuation: is 1 s long; it must be shorter than the duration"):
        model.generate_continuation(wav, 32000)
    with pytest.raises(RequestError, match=r"^melody: this model takes no melody"):
        model.generate_with_chroma(["jazz"], wav, 32000)
    with pytest.raises(RequestError, match=r"^duration: must hold at least one frame"):
        jazz(model, duration=0.01)
    with pytest.raises(RequestError, match="nothing to generate"):
        model.generate([])
    model.max_duration = 2.0
    with pytest.raises(RequestError, match=r"^extend_stride: must be at least one frame"):
        jazz(model, duration=3.0, extend_stride=2.0)


def test_files_of_different_models_are_told_apart(tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "stereo_ac" / "state_dict.bin", tmp_path)
    shutil.copy(GOLDENS / "text_mono" / "compression_state_dict.bin", tmp_path)
    checkpoint = tmp_path / "compression_state_dict.bin"
    package = torch.load(checkpoint, weights_only=True)
    package["xp.cfg"] = package["xp.cfg"].replace("n_q: 4", "n_q: 3")
    package["best_state"] = {k: v for k, v in package["best_state"].items() if "layers.3._codebook" not in k}
    torch.save(package, checkpoint)
    with pytest.raises(CheckpointError, match="belong to different models"):
        MusicGen.get_pretrained(tmp_path, hub_dir=GOLDENS / "hub")


def test_a_single_file_is_the_language_models(tmp_path: Path) -> None:
    for name in ("state_dict.bin", "compression_state_dict.bin"):
        shutil.copy(GOLDENS / "text_mono" / name, tmp_path)
    (tmp_path / "state_dict.bin").rename(tmp_path / "mine.bin")
    model = MusicGen.get_pretrained(tmp_path / "mine.bin", hub_dir=GOLDENS / "hub")
    assert model.conditioners == ("description",)


def test_bfloat16_generates_too() -> None:
    model = MusicGen.get_pretrained(GOLDENS / "text_mono", device="cpu", dtype="bfloat16", hub_dir=GOLDENS / "hub")
    assert model.dtype is torch.bfloat16
    assert jazz(model, duration=1.0, seed=3).isfinite().all()
    with pytest.raises(ValueError, match="dtype must be one of float32, bfloat16, int8 on cpu"):
        MusicGen.get_pretrained(GOLDENS / "text_mono", device="cpu", dtype="float16", hub_dir=GOLDENS / "hub")
