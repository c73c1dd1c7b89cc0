"""Where the models of a fetched folder come from: the hub at one commit, or a folder of this machine."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from archive_scripts.errors import CommandError
from archive_scripts.files import copy_stream, progress, read_sha256, write_whole
from handler.errors import CheckpointError
from handler.hub import hub_errors
from handler.model_folder import require_kind
from handler.registry import REVISIONS, SHA256

SOURCES_FILE = "SOURCES.json"


@dataclass(frozen=True, slots=True)
class Source:
    """Where one model was taken from, and what of it.

    Attributes:
        repo: the hub's repository, None for a folder.
        commit: of the repository.
        folder: on this machine.
        sums: sha256 of the files as they were taken, by name.
    """

    repo: str | None
    commit: str | None
    folder: str | None
    sums: dict[str, str]


@dataclass(frozen=True, slots=True)
class Wanted:
    """The files of a model: `required` ones, those of `optional` there are, and the first there is of `one_of`."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    one_of: tuple[str, ...] = ()

    def choose(self, present: set[str], where: str) -> list[str]:
        """The files to take of those present.

        Raises:
            CheckpointError: a required one is missing, or all of `one_of`.
        """
        missing = [file for file in self.required if file not in present]
        if missing:
            raise CheckpointError(f"{where}: {' and '.join(missing)} not found there")
        first = [file for file in self.one_of if file in present][:1]
        if self.one_of and not first:
            raise CheckpointError(f"{where}: none of {', '.join(self.one_of)} found there")
        return [*self.required, *(file for file in self.optional if file in present), *first]


@dataclass(frozen=True, slots=True)
class Listing:
    """What the hub says of the files to download: their sizes in bytes, and the sha256 of the large ones."""

    repo: str
    commit: str
    sizes: dict[str, int]
    sums: dict[str, str]

    @property
    def total_bytes(self) -> int:
        return sum(self.sizes.values())

    def missing_bytes(self, folder: Path) -> int:
        """The bytes of the files that a folder has not."""
        return sum(size for file, size in self.sizes.items() if not (folder / file).is_file())


def list_remote(repo: str, wanted: Wanted, revision: str | None = None) -> Listing:
    """Asks the hub for a repository's files at a branch, tag or commit; by default at the pinned one, or `main`.

    Raises:
        CheckpointError: the hub cannot be reached, or has not what is wanted.
    """
    from huggingface_hub import HfApi

    revision = revision or REVISIONS.get(repo)
    with hub_errors(repo, revision):
        info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    found = {sibling.rfilename: sibling for sibling in info.siblings or []}
    files = wanted.choose(set(found), repo)
    sums = {file: lfs.sha256 for file in files if (lfs := found[file].lfs) is not None}
    return Listing(repo, str(info.sha), {file: found[file].size or 0 for file in files}, sums)


def download(listing: Listing, folder: Path, expected: dict[str, str]) -> Source:
    """Downloads into a folder; a download that was broken off goes on where it stopped.

    Args:
        expected: sha256 that files must have, by name.

    Raises:
        CheckpointError: the download failed, or a file is not the one that is expected.
    """
    from huggingface_hub import snapshot_download

    with hub_errors(listing.repo, listing.commit):
        snapshot_download(listing.repo, revision=listing.commit, allow_patterns=list(listing.sizes), local_dir=folder)
    sums = sums_of(folder, list(listing.sizes))
    known = {file: SHA256[listing.repo, file] for file in sums if (listing.repo, file) in SHA256}
    for beginnings, whose in ((listing.sums, "the hub's"), (known, "the published file's"), (expected, "the recorded")):
        for file, beginning in beginnings.items():
            if file in sums and not sums[file].startswith(beginning):
                (folder / file).unlink()
                raise CheckpointError(
                    f"{listing.repo}: {file} has the sha256 {sums[file]}, and {whose} begins with {beginning}. "
                    "It was deleted; run the command again to download it anew."
                )
    shutil.rmtree(folder / ".cache", ignore_errors=True)  # the client's own notes
    return Source(listing.repo, listing.commit, None, sums)


def copy_local(source: Path, files: list[str], folder: Path) -> Source:
    """Copies files of a folder of this machine; each appears only when it is complete.

    Raises:
        CheckpointError: one is something else, such as a Git LFS pointer or an HTML page in the place of weights.
    """
    for file in files:
        require_kind(source / file)
    folder.mkdir(parents=True, exist_ok=True)
    sums = {}
    with progress(source.name, sum((source / file).stat().st_size for file in files)) as bar:
        for file in files:
            beside = folder / f".{file}.partial"
            with (source / file).open("rb") as reader, beside.open("wb") as writer:
                sums[file] = copy_stream(reader, writer, bar)
            os.replace(beside, folder / file)
    return Source(None, None, str(source), sums)


def sums_of(folder: Path, files: list[str]) -> dict[str, str]:
    """The sha256 of files, by name; those that are not there are left out."""
    present = [file for file in files if (folder / file).is_file()]
    sums = {}
    with progress("checksums", sum((folder / file).stat().st_size for file in present)) as bar:
        for file in present:
            with (folder / file).open("rb") as opened:
                sums[file] = read_sha256(opened, bar)
    return sums


def read_sources(folder: Path) -> dict[str, Source]:
    """What `write_sources` wrote, by the model's place in the folder; empty where there is no such file.

    Raises:
        CommandError: the file is not readable.
    """
    try:
        entries: dict[str, Any] = json.loads((folder / SOURCES_FILE).read_text(encoding="utf-8"))
        return {place: Source(**entry) for place, entry in entries.items()}
    except FileNotFoundError:
        return {}
    except (AttributeError, TypeError, ValueError) as error:
        raise CommandError(f"{folder / SOURCES_FILE} is damaged ({error}); delete it to fetch anew") from error


def write_sources(folder: Path, sources: dict[str, Source]) -> None:
    write_whole(
        folder / SOURCES_FILE, json.dumps({place: asdict(source) for place, source in sources.items()}, indent=2) + "\n"
    )
