"""Checkpoint files: what is read, and what is refused, each with its own message."""

from __future__ import annotations

import gzip
import io
import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save as save_safetensors

from handler.builders import build_language_model
from handler.checkpoint import Checkpoint, Config, Pointer, read_checkpoint
from handler.errors import CheckpointError
from tests.checkpoints import lm_checkpoint, lm_config, lm_state, write_export

pytestmark = pytest.mark.faults

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


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


def torch_bytes(package: object, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(package, buffer, **settings)
    return buffer.getvalue()


def zip_of(name: str, content: bytes = b"hello") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(3))
    return buffer.getvalue()


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4c8334b0\nsize 841019693\n"
OTHER_FILES: dict[str, tuple[bytes, str, str]] = {
    "lfs": (LFS, "a Git LFS pointer", "git lfs pull`"),
    "lfs, windows": (LFS.replace(b"\n", b"\r\n"), "a Git LFS pointer", "git lfs pull`"),
    "annex": (b"/annex/objects/MD5E-s123--abc.bin\n", "a git-annex pointer", "annex get"),
    "html": (b"<!DOCTYPE html>\n<html><head><title>Sign in</title>", "an HTML page", "archive_scripts fetch"),
    "html after a comment": (b"\xef\xbb\xbf\n<!-- x --><HTML lang=en>", "an HTML page", "/resolve/"),
    "xml": (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "AccessDenied", "Download it again"),
    "json": (b'{"error":"Entry not found"}', 'a JSON text (\'{"error":"Entry not found"}\')', "Download it again"),
    "text": (b"Entry not found", "a text ('Entry not found')", "Download it again"),
    "empty": (b"", "an empty file", "Download it again"),
    "zeros": (bytes(5000), "filled with zero bytes", "Download it again"),
    "gzip": (gzip.compress(b"hello"), "compressed by gzip", "archive_scripts export"),
    "zstd": (b"\x28\xb5\x2f\xfd" + bytes(50), "compressed by zstd", "archive_scripts export"),
    "zip": (zip_of("weights/a.bin"), "a zip archive (of weights/a.bin)", "unzip"),
    "mar": (zip_of("MAR-INF/MANIFEST.json"), "an archive of TorchServe", "archive_scripts register"),
    "cut zip": (zip_of("a")[:20], "cut short or damaged", "Download it again"),
    "torchscript": (zip_of("model/constants.pkl"), "a TorchScript program", "archive_scripts fetch"),
    "tar": (b"a" * 257 + b"ustar\x0000" + bytes(2000), "a tar archive", "archive_scripts export"),
    "safetensors": (
        save_safetensors({"a": torch.zeros(2)}),
        "a safetensors file",
        "archive_scripts export --base small",
    ),
    "numpy": (npy(), "a NumPy array", "archive_scripts fetch"),
    "pickle": (pickle.dumps({"a": 1}), "a plain Python pickle", "torch.save"),
    "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(50), "an HDF5 file", "archive_scripts fetch"),
    "gguf": (b"GGUF\x03\0\0\0" + bytes(50), "a GGUF file", "archive_scripts fetch"),
    "noise": (bytes(range(7, 256)), "of an unknown kind", "Download it again"),
}


@pytest.mark.parametrize("name", ["state_dict.bin", "compression_state_dict.bin"])
@pytest.mark.parametrize(("content", "what", "advice"), OTHER_FILES.values(), ids=OTHER_FILES)
def test_a_file_of_another_kind_is_told_what_it_is_and_what_to_do(
    name: str, content: bytes, what: str, advice: str, tmp_path: Path
) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    message = refusal(path)
    assert what in message
    assert advice in message
    assert "\n" not in message


@pytest.mark.parametrize("name", ["state_dict.bin", "compression_state_dict.bin"])
def test_a_torch_file_of_before_version_1_6_is_read(name: str, tmp_path: Path) -> None:
    package = torch.load(GOLDENS / "text_mono" / name, weights_only=True)
    torch.save(package, tmp_path / name, _use_new_zipfile_serialization=False)
    checkpoint = read_checkpoint(tmp_path / name)
    assert isinstance(checkpoint, Checkpoint)
    assert checkpoint.state.keys() == package["best_state"].keys()
    checkpoint.release()  # its tensors lie in no file
    assert all(torch.equal(checkpoint.state[key], value) for key, value in package["best_state"].items())


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.99])
def test_an_old_torch_file_that_is_cut_short_is_told_so(kept: float, path: Path) -> None:
    config = lm_config()
    package = {"best_state": lm_state(config), "xp.cfg": yaml.safe_dump(config)}
    content = torch_bytes(package, _use_new_zipfile_serialization=False)
    path.write_bytes(content[: int(kept * len(content))])
    assert "cut short or damaged" in refusal(path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("zipped", [False, True])
def test_a_pickle_protocol_that_cannot_be_read_safely_is_told_how_to_save_again(path: Path, zipped: bool) -> None:
    package = {"best_state": {"a": torch.zeros(2)}, "xp.cfg": "dim: 3"}
    path.write_bytes(torch_bytes(package, pickle_protocol=4, _use_new_zipfile_serialization=zipped))
    assert "Save it again with torch.save, without pickle_protocol" in refusal(path)


def test_foreign_classes_in_an_old_torch_file_are_refused_and_never_run(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(path.parent)
    package = {"best_state": {}, "xp.cfg": "", "evil": _Evil()}
    path.write_bytes(torch_bytes(package, _use_new_zipfile_serialization=False))
    assert "only tensors and plain types" in refusal(path)
    assert not Path("evil").exists()
