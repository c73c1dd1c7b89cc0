from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx2
import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from handler.errors import CheckpointError
from handler.registry import (
    AUXILIARIES,
    CHECKPOINT_FILES,
    VARIANTS,
    auxiliary_files,
    find_auxiliary,
    find_variant,
    resolve,
)

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"


class FakeHub:
    """Stands for `snapshot_download`: records its arguments, then gives a folder or raises."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.calls = folder, list[dict[str, Any]]()
        self.files: dict[str, list[str]] = {}
        self.error: Exception | None = None

    def __call__(self, repo: str, **arguments: Any) -> str:
        self.calls.append({"repo": repo, **arguments})
        if self.error is not None:
            raise self.error
        snapshot = self.folder / repo.replace("/", "--")
        snapshot.mkdir(parents=True, exist_ok=True)
        for file in self.files.get(repo, []):
            if file in arguments["allow_patterns"]:
                (snapshot / file).touch()
        return str(snapshot)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeHub:
    hub = FakeHub(tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub)
    return hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in CHECKPOINT_FILES:
        (folder / file).touch()
    return folder


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda variant: variant.name)
def test_every_spelling_of_a_variant_names_its_repository(variant: Any) -> None:
    bare = variant.repo.removeprefix("facebook/")
    for name in (variant.name, bare, variant.repo, variant.name.upper()):
        assert find_variant(name) is variant


def test_the_registry_knows_the_published_variants() -> None:
    musicgens = "small medium large melody melody-large style"
    stereo = "stereo-small stereo-medium stereo-large stereo-melody stereo-melody-large"
    assert set(VARIANTS) == {*musicgens.split(), *stereo.split(), "audiogen-medium"}
    assert VARIANTS["stereo-small"].repo == "facebook/musicgen-stereo-small"
    assert VARIANTS["audiogen-medium"].repo == "facebook/audiogen-medium"


def test_every_auxiliary_model_a_variant_needs_is_known() -> None:
    assert {name for variant in VARIANTS.values() for name in variant.auxiliaries} <= set(AUXILIARIES)


def test_a_folder_and_either_of_its_files_resolve_to_the_folder(folder: Path) -> None:
    assert resolve(folder) == folder
    assert resolve(str(folder)) == folder
    for file in CHECKPOINT_FILES:
        assert resolve(folder / file) == folder


def test_a_registry_name_wins_over_a_folder_which_is_reached_as_a_path(
    folder: Path, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.rename(folder.parent / "small")
    monkeypatch.chdir(folder.parent)
    hub.files["facebook/musicgen-small"] = list(CHECKPOINT_FILES)
    assert resolve("small").name == "facebook--musicgen-small"
    assert resolve("./small") == Path("small")


def test_an_incomplete_folder_is_refused_with_the_file_it_lacks(folder: Path) -> None:
    (folder / "compression_state_dict.bin").unlink()
    for name in (folder, folder / "state_dict.bin"):
        with pytest.raises(CheckpointError, match=r"compression_state_dict\.bin missing"):
            resolve(name)


def test_a_file_of_another_name_is_refused(folder: Path) -> None:
    (folder / "model.bin").touch()
    with pytest.raises(CheckpointError, match=r"model\.bin: an exported file is named state_dict\.bin or"):
        resolve(folder / "model.bin")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "~/nowhere", "a/b/c", "lm/state_dict.bin"])
def test_a_path_that_is_not_there_is_not_taken_for_a_hub_id(name: str, hub: FakeHub) -> None:
    with pytest.raises(CheckpointError, match="no such file or folder"):
        resolve(name)
    assert not hub.calls


@pytest.mark.parametrize(
    ("name", "close"),
    [("smal", "small"), ("musicgen-medum", "medium"), ("sterio-melody", "stereo-melody"), ("debgu", "debug")],
)
def test_an_unknown_name_lists_the_close_ones(name: str, close: str) -> None:
    with pytest.raises(CheckpointError, match=f"Did you mean .*{close}"):
        resolve(name)


def test_an_unknown_name_close_to_none_lists_them_all() -> None:
    with pytest.raises(CheckpointError, match=r"Known variants: small, medium, .*, debug\. A hub id"):
        resolve("xyzzy")


def test_a_hub_id_is_downloaded_as_exactly_the_two_files(hub: FakeHub, tmp_path: Path) -> None:
    hub.files["someone/jingles"] = [*CHECKPOINT_FILES, "README.md"]
    found = resolve("someone/jingles", revision="v2", token="secret", cache_dir=tmp_path)
    assert sorted(file.name for file in found.iterdir()) == sorted(CHECKPOINT_FILES)
    assert hub.calls == [
        {
            "repo": "someone/jingles",
            "revision": "v2",
            "token": "secret",
            "cache_dir": tmp_path,
            "allow_patterns": list(CHECKPOINT_FILES),
        }
    ]


def test_a_repository_without_an_export_is_refused(hub: FakeHub) -> None:
    hub.files["someone/other"] = ["model.safetensors"]
    with pytest.raises(CheckpointError, match=r"someone/other: state_dict\.bin and compression_state_dict\.bin"):
        resolve("someone/other")


def _http(kind: Callable[..., Exception], status: int) -> Exception:
    response = httpx2.Response(status, request=httpx2.Request("GET", "https://hub.invalid/api"))
    return kind("refused", response=response)


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (_http(errors.RepositoryNotFoundError, 404), "no such repository on the hub, or it is private"),
        (_http(errors.GatedRepoError, 403), "Accept its terms on the hub's page, then run `hf auth login`"),
        (_http(errors.RevisionNotFoundError, 404), "someone/jingles@v2: the repository has no such branch"),
        (_http(errors.HfHubHTTPError, 503), "the download failed: refused"),
        (errors.LocalEntryNotFoundError("nothing cached"), "the hub could not be reached"),
        (httpx2.ConnectError("refused"), r"the hub could not be reached \(ConnectError: refused\)"),
        (errors.HFValidationError("bad id"), "not a valid hub id"),
        (OSError(28, "No space left on device"), "the download failed: .*No space left"),
    ],
)
def test_an_error_of_the_hub_says_what_to_do(hub: FakeHub, error: Exception, says: str) -> None:
    hub.error = error
    with pytest.raises(CheckpointError, match=says):
        resolve("someone/jingles", revision="v2")


def test_offline_and_not_cached_says_so(hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.error = errors.LocalEntryNotFoundError("nothing cached")
    with pytest.raises(CheckpointError, match=r"musicgen-small is not in the .* cache, and HF_HUB_OFFLINE is set"):
        resolve("small")


def test_the_real_client_finds_a_cached_checkpoint_while_offline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    repo = tmp_path / "models--facebook--musicgen-small"
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(CheckpointError, match=r"state_dict\.bin and compression_state_dict\.bin not found"):
        resolve("small", cache_dir=tmp_path)
    for file in CHECKPOINT_FILES:
        (repo / "snapshots" / commit / file).touch()
    assert resolve("small", cache_dir=tmp_path) == repo / "snapshots" / commit


def test_an_auxiliary_model_is_looked_for_in_the_given_folder_first(folder: Path, tmp_path: Path) -> None:
    (folder / "hub" / "t5-base").mkdir(parents=True)
    assert find_auxiliary("t5-base", folder) == folder / "hub" / "t5-base"
    (tmp_path / "models" / "t5-base").mkdir(parents=True)
    assert find_auxiliary("t5-base", folder, tmp_path / "models") == tmp_path / "models" / "t5-base"
    assert find_auxiliary("google-t5/t5-base", folder, tmp_path / "empty") == folder / "hub" / "t5-base"


def test_a_codec_named_by_its_hub_id_is_found_by_its_last_part() -> None:
    found = find_auxiliary("facebook/encodec_32khz", GOLDENS / "stereo_hf", GOLDENS / "hub")
    assert found == GOLDENS / "hub" / "encodec_32khz"


@pytest.mark.parametrize(
    ("name", "repo"),
    [
        ("t5-base", "google-t5/t5-base"),
        ("t5-large", "google-t5/t5-large"),
        ("facebook/encodec_32khz", "facebook/encodec_32khz"),
        ("MERT-v1-95M", "m-a-p/MERT-v1-95M"),
        ("someone/t5-base", "someone/t5-base"),
    ],
)
def test_an_auxiliary_model_comes_from_its_repository_without_duplicate_weights(
    name: str, repo: str, folder: Path, hub: FakeHub
) -> None:
    hub.files[repo] = ["config.json", "model.safetensors", "pytorch_model.bin", "flax_model.msgpack"]
    found = find_auxiliary(name, folder)
    assert sorted(file.name for file in found.iterdir()) == ["config.json", "model.safetensors"]
    assert auxiliary_files(name, found) == [Path("config.json"), Path("model.safetensors")]


def test_weights_in_the_older_format_are_taken_where_there_are_no_others(folder: Path, hub: FakeHub) -> None:
    hub.files["m-a-p/MERT-v1-95M"] = ["config.json", "pytorch_model.bin"]
    found = find_auxiliary("MERT-v1-95M", folder)
    assert auxiliary_files("MERT-v1-95M", found) == [Path("config.json"), Path("pytorch_model.bin")]


def test_a_missing_auxiliary_model_says_where_it_was_looked_for(folder: Path, tmp_path: Path, hub: FakeHub) -> None:
    hub.error = errors.LocalEntryNotFoundError("nothing cached")
    with pytest.raises(CheckpointError, match=f"t5-base is not at {tmp_path}/a/t5-base and {folder}/hub/t5-base"):
        find_auxiliary("t5-base", folder, tmp_path / "a")


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(CheckpointError, match=r"no weights in this folder; one of model\.safetensors"):
        auxiliary_files("t5-base", tmp_path)


def test_the_debug_model_is_written_once_and_found_again(tmp_path: Path) -> None:
    first = resolve("debug", cache_dir=tmp_path)
    written = SimpleNamespace(state=(first / "state_dict.bin").stat())
    assert resolve("debug", cache_dir=tmp_path) == first
    assert (first / "state_dict.bin").stat().st_mtime_ns == written.state.st_mtime_ns
    assert [entry.name for entry in first.parent.iterdir()] == [first.name]
