from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor

from archive_scripts.__main__ import main
from archive_scripts.export import export
from archive_scripts.training import read_training
from handler.errors import CheckpointError
from handler.musicgen import MusicGen
from handler.registry import CHECKPOINT_FILES

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
HUB = GOLDENS / "hub"
PROMPT = "happy rock"


def _training(folder: Path, export_file: Path, fsdp: bool = False, config: dict[str, Any] | None = None) -> Path:
    """A training folder as audiocraft leaves it, whose best state is that of an export."""
    package = torch.load(export_file, weights_only=True)
    cfg = OmegaConf.create(package["xp.cfg"])
    for key, value in (config or {}).items():
        OmegaConf.update(cfg, key, value)
    OmegaConf.set_struct(cfg, True)
    OmegaConf.set_readonly(cfg, True)
    state: dict[str, Tensor] = package["best_state"]
    shards = {f"_fsdp_wrapped_module.{name}": value.flatten()[:1] for name, value in state.items()}
    checkpoint = {
        "model": {name: torch.zeros_like(value) for name, value in state.items()},
        "optimizer": {
            "state": {0: {"step": 7, "exp_avg": torch.zeros(3)}},
            "param_groups": [{"lr": 1.0, "params": [0]}],
        },
        "ema": {"state": {"model": {}}, "ids": (1, 2.0, None)},
        "history": [{"train": {"ce": 3.2, "ppl": torch.tensor(24.0)}}],
        "best_state": {"model": shards if fsdp else state},
        "fsdp_best_state": {"model": state} if fsdp else {},
        "xp.cfg": cfg,
        "xp.sig": "97d170e1",
    }
    folder.mkdir(parents=True)
    torch.save(checkpoint, folder / "checkpoint.th")
    return folder


@pytest.fixture
def training(tmp_path: Path) -> Path:
    return _training(tmp_path / "run", GOLDENS / "text_mono" / "state_dict.bin")


@pytest.mark.parametrize("fsdp", [False, True])
def test_an_exported_run_generates_audiocraft_s_own_tokens(fsdp: bool, tmp_path: Path) -> None:
    run = _training(tmp_path / "run", GOLDENS / "text_mono" / "state_dict.bin", fsdp)
    codec = _training(tmp_path / "codec", GOLDENS / "text_mono" / "compression_state_dict.bin")
    output = tmp_path / "export"
    assert main(["export", str(run), str(output), "--compression", str(codec)]) == 0
    assert sorted(path.name for path in output.iterdir()) == sorted(CHECKPOINT_FILES)
    model = MusicGen.get_pretrained(output, hub_dir=HUB)
    model.set_generation_params(use_sampling=False, duration=2.5)
    _, codes = model.generate([PROMPT], return_tokens=True)
    golden = np.load(GOLDENS / "text_mono" / "gen_greedy.npz")["alone0_tokens"]
    assert np.array_equal(codes.numpy(), golden)


def test_an_export_holds_what_audiocraft_s_own_does(training: Path, tmp_path: Path) -> None:
    export(training, tmp_path / "out")
    mine = torch.load(tmp_path / "out" / "state_dict.bin", weights_only=True)
    golden = torch.load(GOLDENS / "text_mono" / "state_dict.bin", weights_only=True)
    assert {key: mine[key] for key in mine if key != "best_state"} == {
        key: golden[key] for key in golden if key != "best_state"
    }
    assert {name: value.dtype for name, value in mine["best_state"].items()} == {
        name: value.dtype for name, value in golden["best_state"].items()
    }
    assert (tmp_path / "out" / "state_dict.bin").stat().st_size < 1.1 * (
        GOLDENS / "text_mono" / "state_dict.bin"
    ).stat().st_size


def test_a_codec_of_the_hub_is_written_as_a_pointer(training: Path, tmp_path: Path) -> None:
    export(training, tmp_path / "out")
    pointer = torch.load(tmp_path / "out" / "compression_state_dict.bin", weights_only=True)
    assert pointer == torch.load(GOLDENS / "stereo_hf" / "compression_state_dict.bin", weights_only=True)


@pytest.mark.parametrize("named", ["//sig/3fe4b1", "/checkpoint/codec.th", None, "//pretrained/"])
def test_a_trained_codec_must_be_given(named: str | None, tmp_path: Path) -> None:
    config = {"compression_model_checkpoint": named}
    run = _training(tmp_path / "run", GOLDENS / "text_mono" / "state_dict.bin", config=config)
    with pytest.raises(CheckpointError, match="with --compression"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("codec", ["text_mono", "text_mono/compression_state_dict.bin", "stereo_hf"])
def test_an_exported_codec_can_be_given_too(codec: str, training: Path, tmp_path: Path) -> None:
    export(training, tmp_path / "out", GOLDENS / codec)
    MusicGen.get_pretrained(tmp_path / "out", hub_dir=HUB)


def test_the_file_of_an_epoch_can_be_exported(training: Path, tmp_path: Path) -> None:
    (training / "checkpoint.th").rename(training / "checkpoint_50.th")
    export(training / "checkpoint_50.th", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"checkpoint\.th does not exist"):
        export(training, tmp_path / "again")


class Evil:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.target),)


def test_code_in_a_checkpoint_is_refused_and_does_not_run(training: Path, tmp_path: Path) -> None:
    package = torch.load(training / "checkpoint.th", weights_only=False)
    torch.save({**package, "history": [Evil(tmp_path / "owned")]}, training / "checkpoint.th")
    with pytest.raises(CheckpointError, match=r"holds (posix|os)\.mkdir; a training checkpoint may hold only tensors"):
        export(training, tmp_path / "out")
    assert not (tmp_path / "owned").exists()
    assert not (tmp_path / "out").exists()


def test_the_allow_list_is_in_force_for_this_read_alone(training: Path) -> None:
    before = set(torch.serialization.get_safe_globals())
    read_training(training)
    assert set(torch.serialization.get_safe_globals()) == before
    assert not any("omegaconf" in str(allowed) for allowed in before)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"best_state": {}}, "has no best_state"),
        ({"best_state": {"model": {"emb": 1}}}, r"best_state\['model'\] is not a model's parameters"),
        ({"best_state": {"model": {"_fsdp_wrapped_module.emb": torch.ones(1)}}}, "one process's part of a model"),
        ({"xp.cfg": "a: 1"}, "is no language model: its xp.cfg has no transformer_lm"),
        ({"xp.cfg": [1]}, "its xp.cfg is a list, not a configuration"),
        ({"xp.cfg": None}, r"has no xp.cfg. Export it first: `python -m archive_scripts export --base small /"),
    ],
)
def test_a_checkpoint_that_cannot_be_exported_says_why(
    change: dict[str, Any], says: str, training: Path, tmp_path: Path
) -> None:
    package = torch.load(training / "checkpoint.th", weights_only=False)
    torch.save({**package, **change}, training / "checkpoint.th")
    with pytest.raises(CheckpointError, match=says):
        export(training, tmp_path / "out")


def test_models_of_another_kind_and_damaged_files_are_refused(training: Path, tmp_path: Path) -> None:
    codec = _training(tmp_path / "codec", GOLDENS / "text_mono" / "compression_state_dict.bin")
    with pytest.raises(CheckpointError, match="is no language model"):
        export(codec, tmp_path / "out")
    with pytest.raises(CheckpointError, match="is no codec"):
        export(training, tmp_path / "out", training)
    data = (training / "checkpoint.th").read_bytes()
    (training / "checkpoint.th").write_bytes(data[: len(data) // 2])
    with pytest.raises(CheckpointError, match="cut short or damaged"):
        export(training, tmp_path / "out")


def test_a_failure_while_writing_leaves_the_export_that_was_there(
    training: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(GOLDENS / "text_mono", tmp_path / "out")
    before = sorted(path.name for path in (tmp_path / "out").iterdir())
    original = torch.save

    def fail(package: Any, path: Path) -> None:
        original(package, path)
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match="disk full"):
        export(training, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
