"""The melody conditioner keeps its promises for any melody, and says what it cannot honour."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from handler.checkpoint import Config
from handler.conditioners.base import WavInput
from handler.conditioners.chroma import Chroma, ChromaStemConditioner, build_chroma, chroma_filters
from handler.conditioners.htdemucs import MelodySeparator
from handler.errors import CheckpointError
from tests.goldens.wavs import synth

HUB = Path(__file__).parents[1] / "goldens/hub"

CONFIG = """
sample_rate: 32000
dataset: {segment_duration: 30}
transformer_lm: {dim: 64}
conditioners:
  self_wav:
    model: chroma_stem
    chroma_stem: {sample_rate: "${sample_rate}", n_chroma: 12, radix2_exp: 14, argmax: true, match_len_on_eval: false,
      eval_wavs: null, n_eval_wavs: 100, cache_path: "${oc.env:NOWHERE}"}
"""


def build(changes: str = "") -> ChromaStemConditioner:
    """The conditioner of `CONFIG`; `changes` replaces text in it, as `old -> new`."""
    old, _, new = changes.partition(" -> ")
    config = Config.parse(CONFIG.replace(old, new) if old else CONFIG, "state_dict.bin")
    section = config.section("conditioners").section("self_wav").section("chroma_stem")
    return build_chroma(config, section, {}, lambda name: HUB / name)


@pytest.fixture(scope="module")
def conditioner() -> ChromaStemConditioner:
    return build().requires_grad_(False)


def embedding(conditioner: ChromaStemConditioner, wav: Tensor) -> Tensor:
    return conditioner(WavInput(wav, 32000)).embedding


@pytest.mark.parametrize("samples", [1, 2, 700, 32000])
def test_silence_is_as_no_melody(conditioner: ChromaStemConditioner, samples: int) -> None:
    null = conditioner(None)
    assert null.is_null
    assert null.embedding.shape == (1, 235, 64)
    assert torch.equal(embedding(conditioner, torch.zeros(samples)), null.embedding)


def test_a_single_sample_is_as_no_melody(conditioner: ChromaStemConditioner) -> None:
    assert torch.isfinite(embedding(conditioner, torch.ones(1))).all()


def test_a_short_melody_is_repeated_and_a_long_one_cut(
    conditioner: ChromaStemConditioner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conditioner, "separator", lambda wav, rate: wav)
    short = embedding(conditioner, synth(2)[0])  # 16 frames
    assert torch.equal(short[:, 16:32], short[:, :16])
    assert torch.equal(short[:, 224:], short[:, :11])
    long = embedding(conditioner, synth(31)[0])
    assert long.shape == (1, 235, 64)
    assert torch.equal(long[:, :230], embedding(conditioner, synth(30)[0])[:, :230])


def test_a_pure_tone_is_its_pitch_class(conditioner: ChromaStemConditioner) -> None:
    time = torch.arange(64000) / 32000
    for semitones in range(12):
        tone = torch.sin(2 * torch.pi * 261.626 * 2 ** (semitones / 12) * time)  # from middle C on
        assert conditioner.chroma(tone).argmax(dim=-1)[2:-2].unique().tolist() == [semitones]


def test_all_octaves_of_a_frequency_share_their_pitch_class() -> None:
    filters = chroma_filters(32000, 2**14, 12)
    assert filters.shape == (12, 2**13 + 1)
    classes = [filters[:, bin].argmax() for bin in (225, 450, 900, 1800)]  # 439.5 Hz and above
    assert classes == [9, 9, 9, 9]


@pytest.mark.parametrize("sample_rate", [16000, 32000])
def test_the_length_is_that_of_the_training_segment(sample_rate: int) -> None:
    chroma = Chroma(sample_rate, 12, 2**14, argmax=True)
    for samples in (1, 2**14 - 1, 2**14, 20000, sample_rate * 30):
        assert len(chroma(torch.zeros(samples))) == chroma.num_frames(samples)


def test_the_separator_is_not_in_the_checkpoint(conditioner: ChromaStemConditioner) -> None:
    assert isinstance(conditioner.separator, MelodySeparator)
    assert set(conditioner.state_dict()) == {"output_proj.weight", "output_proj.bias", "chroma.spec.window"}


def test_a_shorter_training_segment_gives_a_shorter_condition() -> None:
    assert build("segment_duration: 30 -> segment_duration: 10").length == 79


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ("radix2_exp: 14 -> radix2_exp: 40", r"self_wav\.chroma_stem\.radix2_exp .* 2 to 20, not 40"),
        ("n_chroma: 12 -> n_chroma: true", r"chroma_stem\.n_chroma .* 1 to 96, not True"),
        ("argmax: true -> argmax: 1", r"chroma_stem\.argmax must be true or false, not 1"),
        ("argmax: true -> argmax: true, winhop: 512", r"chroma_stem\.winhop .* cannot be honoured"),
        ("segment_duration: 30 -> segment_duration: 0", r"dataset\.segment_duration .* not 0"),
    ],
)
def test_what_cannot_be_honoured_is_named(changes: str, message: str) -> None:
    with pytest.raises(CheckpointError, match=rf"state_dict\.bin: .*{message}"):
        build(changes)
