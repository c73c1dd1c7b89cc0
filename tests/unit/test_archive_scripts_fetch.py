from __future__ import annotations

import hashlib
import json
import shutil
from collections import namedtuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub import errors

from archive_scripts import sources
from archive_scripts.__main__ import main
from archive_scripts.fetch import fetch
from archive_scripts.pack import pack
from archive_scripts.verify import verify
from handler.conditioners.htdemucs import load_htdemucs
from handler.errors import CheckpointError
from handler.registry import REVISIONS, SHA256, VARIANTS
from tests.variants import write_variant

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
HUB = GOLDENS / "hub"
SMALL, T5, MELODY = "facebook/musicgen-small", "google-t5/t5-base", "facebook/musicgen-melody"
T5_FILES = ("config.json", "model.safetensors", "spiece.model", "tokenizer.json", "tokenizer_config.json")


class FakeHub:
    """Stands for the hub client: repositories are folders, and a download into a folder can break off."""

    def __init__(self) -> None:
        self.repos: dict[str, Path] = {}
        self.listed: list[tuple[str, str | None]] = []
        self.downloaded: list[tuple[str, str]] = []
        self.break_off_after: int | None = None

    def model_info(self, api: object, repo: str, *, revision: str | None, files_metadata: bool) -> Any:
        assert files_metadata
        self.listed.append((repo, revision))
        if repo not in self.repos:
            raise errors.LocalEntryNotFoundError("no such thing")
        siblings = []
        for path in sorted(self.repos[repo].iterdir()):
            if path.is_file():
                lfs = SimpleNamespace(sha256=_sha256(path)) if path.suffix in (".bin", ".safetensors") else None
                siblings.append(SimpleNamespace(rfilename=path.name, size=path.stat().st_size, lfs=lfs))
        return SimpleNamespace(sha=revision or f"{len(repo):040d}", siblings=siblings)

    def snapshot_download(self, repo: str, *, revision: str, allow_patterns: list[str], local_dir: Path) -> str:
        (local_dir / ".cache" / "huggingface").mkdir(parents=True, exist_ok=True)
        for file in allow_patterns:
            if (local_dir / file).is_file():
                continue
            if self.break_off_after == len(self.downloaded):
                self.break_off_after = None
                (local_dir / ".cache" / "huggingface" / f"{file}.incomplete").touch()
                raise OSError("connection reset")
            shutil.copyfile(self.repos[repo] / file, local_dir / file)
            self.downloaded.append((repo, file))
        return str(local_dir)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    hub = FakeHub()
    hub.repos = {SMALL: GOLDENS / "text_mono", MELODY: GOLDENS / "melody", T5: HUB / "t5-base"}
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: hub.model_info(*args, **kwargs))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    monkeypatch.setattr(sources, "SHA256", {})  # these are not the published files
    return hub


def _files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_exactly_the_files_a_variant_needs_are_fetched(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fetch", "small", str(tmp_path / "small")]) == 0
    models = {"state_dict.bin", "compression_state_dict.bin", *(f"hub/t5-base/{file}" for file in T5_FILES)}
    assert _files(tmp_path / "small") == {*models, "SHA256SUMS", "SOURCES.json"}
    for line in (tmp_path / "small" / "SHA256SUMS").read_text().splitlines():
        digest, path = line.split("  ")
        assert digest == _sha256(tmp_path / "small" / path)
        models.remove(path)
    assert not models
    said = capsys.readouterr().out
    total = sum(
        (GOLDENS / "text_mono" / file).stat().st_size for file in ("state_dict.bin", "compression_state_dict.bin")
    )
    total += sum((HUB / "t5-base" / file).stat().st_size for file in T5_FILES)
    assert f"{SMALL}: {total / 1e6:.1f} MB to download or check, in all" in said
    assert f"7 files, {total / 1e6:.1f} MB, each checked" in said


def test_the_pinned_commits_are_asked_for_and_the_others_recorded(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["adefossez/HTDemucs"] = HUB / "htdemucs"
    fetch("small", tmp_path / "small")
    assert set(hub.listed) == {(SMALL, REVISIONS[SMALL]), (T5, REVISIONS[T5])}
    assert MELODY not in REVISIONS
    fetch("melody", tmp_path / "melody")
    recorded = json.loads((tmp_path / "melody" / "SOURCES.json").read_text())
    assert recorded["."]["repo"] == MELODY
    assert recorded["."]["commit"] == f"{len(MELODY):040d}"
    assert recorded["."]["sums"]["state_dict.bin"] == _sha256(GOLDENS / "melody" / "state_dict.bin")
    assert recorded["hub/t5-base"]["commit"] == REVISIONS[T5]


def test_every_pinned_commit_and_hash_is_of_a_repository_that_is_fetched() -> None:
    known = {variant.repo for variant in VARIANTS.values()} | {T5, "google-t5/t5-large"}
    known |= {"m-a-p/MERT-v1-95M", "adefossez/HTDemucs"}
    assert set(REVISIONS) <= known
    assert {repo for repo, _ in SHA256} <= known
    assert all(len(commit) == 40 for commit in REVISIONS.values())


def test_a_revision_is_that_of_the_variant_alone(hub: FakeHub, tmp_path: Path) -> None:
    fetch("small", tmp_path, revision="v2")
    assert set(hub.listed) == {(SMALL, "v2"), (T5, REVISIONS[T5])}


def test_a_download_that_broke_off_goes_on_when_it_is_run_again(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.break_off_after = 3
    assert main(["fetch", "small", str(tmp_path)]) == 2
    assert f"fetch: {T5}@{REVISIONS[T5]}: the download failed: connection reset" in capsys.readouterr().err
    assert len(hub.downloaded) == 3
    assert main(["fetch", "small", str(tmp_path)]) == 0
    assert len(hub.downloaded) == 7
    assert not list(tmp_path.rglob("*.incomplete"))


def test_a_complete_folder_is_checked_and_nothing_downloaded_again(hub: FakeHub, tmp_path: Path) -> None:
    fetch("small", tmp_path)
    downloaded = list(hub.downloaded)
    fetch("small", tmp_path)
    assert hub.downloaded == downloaded
    (tmp_path / "hub" / "t5-base" / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"config\.json has the sha256 .*, and the recorded begins with"):
        fetch("small", tmp_path)
    fetch("small", tmp_path)
    assert hub.downloaded[len(downloaded) :] == [(T5, "config.json")]


def test_recorded_sources_make_another_machine_fetch_the_same(hub: FakeHub, tmp_path: Path) -> None:
    fetch("small", tmp_path / "first")
    (tmp_path / "second").mkdir()
    shutil.copy(tmp_path / "first" / "SOURCES.json", tmp_path / "second")
    fetch("small", tmp_path / "second")
    assert (tmp_path / "first" / "SHA256SUMS").read_text() == (tmp_path / "second" / "SHA256SUMS").read_text()

    (tmp_path / "third").mkdir()
    shutil.copy(tmp_path / "first" / "SOURCES.json", tmp_path / "third")
    hub.repos[SMALL] = GOLDENS / "melody"  # as if the commit had changed
    with pytest.raises(CheckpointError, match=r"state_dict\.bin has the sha256 .*the recorded begins with"):
        fetch("small", tmp_path / "third")


def test_a_file_that_is_not_the_published_one_is_deleted_and_named(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "SHA256", {(SMALL, "compression_state_dict.bin"): "37d256b5"})
    with pytest.raises(CheckpointError, match=r"compression_state_dict\.bin has the sha256 .* begins with 37d256b5"):
        fetch("small", tmp_path)
    assert _files(tmp_path) == {"state_dict.bin"}


def test_htdemucs_is_converted_whatever_its_form(hub: FakeHub, tmp_path: Path) -> None:
    fetch("melody", tmp_path, local=HUB)  # htdemucs.th
    assert _files(tmp_path / "hub" / "htdemucs") == {"htdemucs.json", "htdemucs.safetensors"}
    load_htdemucs(tmp_path / "hub" / "htdemucs")
    sums = json.loads((tmp_path / "SOURCES.json").read_text())["hub/htdemucs"]["sums"]
    assert sums == {"htdemucs.th": _sha256(HUB / "htdemucs" / "htdemucs.th")}
    converted = _sha256(tmp_path / "hub" / "htdemucs" / "htdemucs.safetensors")
    fetch("melody", tmp_path, local=tmp_path / "hub")  # converted already
    assert _sha256(tmp_path / "hub" / "htdemucs" / "htdemucs.safetensors") == converted
    assert not (tmp_path / ".htdemucs").exists()


def test_local_copies_are_taken_instead_and_nothing_is_asked_of_the_hub(hub: FakeHub, tmp_path: Path) -> None:
    copies = write_variant("melody-large", tmp_path / "copies")
    fetch("melody-large", tmp_path / "fetched", local=copies)
    assert not hub.listed
    shutil.rmtree(copies)
    archive = pack(str(tmp_path / "fetched"), "melody-large", tmp_path / "store")
    assert not any(dict(verify(archive)).values())


def test_what_a_local_folder_lacks_is_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    fetch("small", tmp_path, local=GOLDENS / "text_mono")
    assert {repo for repo, _ in hub.downloaded} == {T5}


@pytest.mark.parametrize("name", ["dac_44khz", "dac_24khz"])
def test_a_codec_of_descript_is_fetched_from_its_repository(name: str, hub: FakeHub, tmp_path: Path) -> None:
    copies, dac = tmp_path / "copies", tmp_path / "dac"
    copies.mkdir()
    dac.mkdir()
    for file in ("config.json", "model.safetensors", "preprocessor_config.json"):
        (dac / file).write_text(file)
    hub.repos[f"descript/{name}"] = dac
    shutil.copy(GOLDENS / "text_mono" / "state_dict.bin", copies)
    torch.save({"pretrained": name}, copies / "compression_state_dict.bin")
    fetch("someone/tune", tmp_path / "out", local=copies)
    assert _files(tmp_path / "out" / "hub" / name) == {"config.json", "model.safetensors"}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nonsense"], r"nonsense: neither a variant \(see `list`\) nor a hub id"),
        (["small", "--from", "/nowhere/at/all"], "--from /nowhere/at/all: no such folder"),
        (["someone/else"], "someone/else"),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    arguments: list[str], says: str, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name, *options = arguments
    assert main(["fetch", name, str(tmp_path), *options]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert says.replace("\\", "") in message


def test_a_repository_without_the_files_is_refused_before_anything_is_downloaded(hub: FakeHub, tmp_path: Path) -> None:
    hub.repos["someone/other"] = HUB / "encodec_32khz"
    with pytest.raises(CheckpointError, match=r"someone/other: state_dict\.bin and .* not found there"):
        fetch("someone/other", tmp_path)
    assert not hub.downloaded


def test_a_full_disk_is_seen_before_the_download(
    hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    assert main(["fetch", "small", str(tmp_path)]) == 2
    assert "are needed and 1.0 kB are free" in capsys.readouterr().err
    assert not hub.downloaded
