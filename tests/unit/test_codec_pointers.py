"""A codec's pointer leads to a folder here or to an auxiliary model, in either layout."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from archive_scripts.fetch import fetch
from archive_scripts.pack import pack
from archive_scripts.verify import verify
from handler.builders import build_compression_model
from handler.checkpoint import COMPRESSION_FILE, LM_FILE, Config
from handler.errors import CheckpointError
from handler.registry import find_auxiliary

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
CONFIG = Config.parse("{}", "state_dict.bin")
CODES = torch.tensor([[[1], [2], [3], [0]]])


def write_pointer(folder: Path, name: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"pretrained": name, "exported": True, "version": "1.4.0a2"}, folder / COMPRESSION_FILE)
    return folder / COMPRESSION_FILE


def sound(path: Path) -> torch.Tensor:
    model = build_compression_model(path, CONFIG, lambda name: find_auxiliary(name, path.parent))
    return model.decode(CODES)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A folder with audiocraft's own file."""
    (tmp_path / "codec").mkdir()
    shutil.copy(GOLDENS / "text_mono" / COMPRESSION_FILE, tmp_path / "codec")
    return tmp_path / "codec"


@pytest.mark.parametrize("name", ["../codec", "../codec/compression_state_dict.bin", "{tmp}/codec"])
def test_a_pointer_leads_to_a_folder_or_file_of_this_machine(name: str, own: Path, tmp_path: Path) -> None:
    pointer = write_pointer(tmp_path / "mine", name.format(tmp=tmp_path))
    assert torch.equal(sound(pointer), sound(own / COMPRESSION_FILE))


@pytest.mark.parametrize("name", ["facebook/encodec_32khz", "someone/finetuned-codec"])
def test_a_pointer_leads_to_an_auxiliary_model_in_audiocraft_s_own_layout(name: str, own: Path, tmp_path: Path) -> None:
    pointer = write_pointer(tmp_path / "mine", name)
    shutil.copytree(own, tmp_path / "mine" / "hub" / name.rpartition("/")[2])
    assert torch.equal(sound(pointer), sound(own / COMPRESSION_FILE))


def test_a_pointer_leads_to_an_auxiliary_model_in_transformers_layout(tmp_path: Path) -> None:
    pointer = write_pointer(tmp_path / "mine", "facebook/encodec_32khz")
    shutil.copytree(GOLDENS / "hub" / "encodec_32khz", tmp_path / "mine" / "hub" / "encodec_32khz")
    assert sound(pointer).shape == (1, 1, 640)


def test_pointers_in_a_circle_are_an_error(tmp_path: Path) -> None:
    write_pointer(tmp_path / "a", "../b")
    with pytest.raises(CheckpointError, match="points back to it"):
        sound(write_pointer(tmp_path / "b", "../a"))
    pointer = write_pointer(tmp_path / "c", "someone/codec")
    write_pointer(tmp_path / "c" / "hub" / "codec", "../..")
    with pytest.raises(CheckpointError, match="points back to it"):
        sound(pointer)


def test_an_archive_holds_the_codec_of_either_layout(own: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    write_pointer(mine, "facebook/encodec_32khz")
    shutil.copy(GOLDENS / "text_mono" / LM_FILE, mine)
    shutil.copytree(GOLDENS / "hub" / "t5-base", mine / "hub" / "t5-base")
    shutil.copytree(own, mine / "hub" / "encodec_32khz")
    archive = pack(str(mine), output=tmp_path / "store")
    assert [found for _, found in verify(archive)] == [[]] * 6


@pytest.mark.parametrize("file", ["hub/t5-base/model.safetensors", "state_dict.bin", "compression_state_dict.bin"])
def test_a_git_lfs_pointer_is_told_where_it_lies_before_anything_is_packed_or_copied(
    file: str, own: Path, tmp_path: Path
) -> None:
    mine = Path(shutil.copytree(own, tmp_path / "mine"))
    shutil.copy(GOLDENS / "text_mono" / LM_FILE, mine)
    shutil.copytree(GOLDENS / "hub" / "t5-base", mine / "hub" / "t5-base")
    (mine / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4c83\nsize 841019693\n")
    says = rf"{mine / file} cannot be read: it is a Git LFS pointer.*`cd {(mine / file).parent} && git lfs pull`"
    with pytest.raises(CheckpointError, match=says):
        pack(str(mine), output=tmp_path / "store")
    with pytest.raises(CheckpointError, match=says):
        fetch("small", tmp_path / "fetched", mine)
