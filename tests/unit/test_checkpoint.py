"""Checkpoint files: what is read, and what is refused, each with its own message."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from handler.builders import build_language_model
from handler.checkpoint import Checkpoint, Config, Pointer, read_checkpoint
from handler.errors import CheckpointError
from tests.checkpoints import lm_checkpoint, lm_config, lm_state, write_export

pytestmark = pytest.mark.faults


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state_dict.bin"


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_checkpoint(path)
    assert str(path) in str(error.value)
    return str(error.value)


def test_an_export_is_read_without_copying_its_tensors(path: Path) -> None:
    config = lm_config()
    write_export(path, lm_state(config), config)
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.config["transformer_lm"]["dim"] == 32
    assert str(path) in Path("/proc/self/maps").read_text()


def mapped_bytes(path: Path) -> int:
    """Of this file, what this process's memory holds."""
    held, here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if "-" in line.split()[0] and not line.split()[0].endswith(":"):
            here = line.endswith(str(path))
        elif here and line.startswith("Rss:"):
            held += int(line.split()[1]) * 1024
    return held


def test_what_was_read_is_released_and_comes_back_from_the_file(path: Path) -> None:
    config, big = lm_config(), torch.randn(2**20)
    write_export(path, {**lm_state(config), "big": big}, config)
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint, Checkpoint)
    assert torch.equal(checkpoint.state["big"], big)
    assert mapped_bytes(path) > big.nbytes // 2
    checkpoint.release()
    assert mapped_bytes(path) < big.nbytes // 8
    assert torch.equal(checkpoint.state["big"], big)


def test_memory_that_is_no_files_is_never_released() -> None:
    checkpoint = lm_checkpoint()
    before = {name: tensor.clone() for name, tensor in checkpoint.state.items()}
    checkpoint.release()
    assert all(torch.equal(checkpoint.state[name], tensor) for name, tensor in before.items())


def test_the_first_exports_lack_version_and_exported(path: Path) -> None:
    torch.save({"best_state": {"a": torch.zeros(1)}, "xp.cfg": "dim: 3"}, path)
    assert isinstance(read_checkpoint(path), Checkpoint)


def test_a_pointer_is_recognised(path: Path) -> None:
    torch.save({"pretrained": "facebook/encodec_32khz", "exported": True, "version": "1.0"}, path)
    assert read_checkpoint(path) == Pointer(str(path), "facebook/encodec_32khz")


def test_interpolations_are_resolved_only_when_read() -> None:
    config = Config.parse("a: ${b.c}\nb: {c: 5, d: '${oc.env:NOBODY_SETS_THIS}', e: ['${a}', 2]}\n", "state_dict.bin")
    assert config["a"] == 5
    assert config["b"]["e"] == [5, 2]
    assert config.section("absent") == {}
    with pytest.raises(CheckpointError, match=r"state_dict.bin: b\.d of its xp\.cfg cannot be resolved"):
        config["b"]["d"]


def test_an_absent_file(path: Path) -> None:
    assert "does not exist" in refusal(path)


def test_a_truncated_file(path: Path) -> None:
    write_export(path, lm_state(lm_config()), lm_config())
    path.write_bytes(path.read_bytes()[:-2000])
    assert "cut short or damaged" in refusal(path)


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", b"PK\x03\x04", b"\x80\x04N."])
def test_a_file_of_something_else(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert "damaged" in refusal(path) or "not an exported checkpoint" in refusal(path)


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path("evil"),))


def test_foreign_classes_are_refused_and_never_run(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    torch.save({"best_state": {}, "xp.cfg": "", "evil": _Evil()}, path)
    assert "only tensors and plain types" in refusal(path)
    path.write_bytes(pickle.dumps(_Evil()))
    refusal(path)
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    "package",
    [
        {"model": {}, "optimizer": {}, "xp.cfg": OmegaConf.create({"dim": 3})},
        {"best_state": {"model": {"a": torch.zeros(1)}}, "xp.cfg": "dim: 3"},
        {"fsdp_best_state": {}, "model": {}, "history": []},
    ],
)
def test_a_training_checkpoint_is_told_apart(path: Path, package: dict[str, Any]) -> None:
    torch.save(package, path)
    message = refusal(path)
    assert "training checkpoint" in message
    assert "Export it first" in message


def test_a_missing_entry_is_named(path: Path) -> None:
    torch.save({"best_state": {}}, path)
    assert "has no key 'xp.cfg'" in refusal(path)


def test_a_broken_config(path: Path) -> None:
    write_export(path, {}, "a: [1, 2")
    assert "not readable YAML" in refusal(path)
    write_export(path, {}, "[1, 2]")
    assert "not a mapping" in refusal(path)


def test_missing_unexpected_and_misshapen_parameters_are_named() -> None:
    checkpoint = lm_checkpoint()
    kept = checkpoint.state.pop("transformer.layers.1.linear2.weight")
    with pytest.raises(
        CheckpointError, match=r"state_dict.bin lacks the key 'transformer\.layers\.1\.linear2\.weight'"
    ):
        build_language_model(checkpoint)
    checkpoint.state["transformer.layers.1.linear2.weight"] = kept[:, :5]
    with pytest.raises(
        CheckpointError, match=r"linear2\.weight' has shape \[32, 5\], but its xp.cfg asks for \[32, 128"
    ):
        build_language_model(checkpoint)
    checkpoint.state["transformer.layers.1.linear2.weight"] = kept
    checkpoint.state["transformer.layers.2.linear2.weight"] = kept
    with pytest.raises(CheckpointError, match=r"has the key 'transformer\.layers\.2\.linear2\.weight'"):
        build_language_model(checkpoint)
