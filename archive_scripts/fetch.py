"""`fetch`: download a variant with all it needs."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path
from typing import Any

from archive_scripts.errors import CommandError
from archive_scripts.files import SUMS_FILE, require_space, sums_text, write_whole
from archive_scripts.machine import size
from archive_scripts.needs import needed_auxiliaries
from archive_scripts.sources import (
    SOURCES_FILE,
    Listing,
    Source,
    Wanted,
    copy_local,
    download,
    list_remote,
    read_sources,
    sums_of,
    write_sources,
)
from handler.registry import (
    CHECKPOINT_FILES,
    HTDEMUCS,
    HTDEMUCS_PICKLES,
    auxiliary_folder_name,
    find_auxiliary_model,
    find_variant,
)

HELP = "download a variant with everything it needs"
DESCRIPTION = f"""\
Download exactly the files a variant needs into DIR: the two exported files, and in DIR/hub the auxiliary models that
they name (T5, and as the case may be htdemucs, MERT or a codec). `pack DIR` and `generate DIR` then need no network.
A download that was broken off goes on where it stopped when the command is run again.

  python -m archive_scripts fetch melody checkpoints/melody
  python -m archive_scripts fetch melody checkpoints/melody --from /mnt/usb/melody

--from takes what a folder holds instead of downloading it: state_dict.bin and compression_state_dict.bin, and auxiliary
models by name in it or in its hub/. htdemucs is converted from demucs' own format to safetensors.

DIR/{SOURCES_FILE} records the commit of each repository and the sha256 of each file. A copy of it in an empty folder
makes `fetch` take the same commits, and refuse other files. DIR/{SUMS_FILE} is for `sha256sum --check`.
"""

CHECKPOINT = "."
"""The checkpoint's own place in the folder; those of auxiliary models are `hub/<name>`."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "fetch", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", metavar="NAME", help="a variant's name, or a hub id")
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder to write, made if need be")
    parser.add_argument("--from", dest="local", metavar="DIR", type=Path, help="take what this folder holds from there")
    parser.add_argument(
        "--revision", help="branch, tag or commit of the variant's repository (default: the pinned one, or main)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    fetch(args.variant, args.folder, args.local, args.revision)


def fetch(variant: str, folder: Path, local: Path | None = None, revision: str | None = None) -> None:
    """Fill a folder with a variant and all it needs; the arguments are the command's.

    Raises:
        CheckpointError: something is nowhere, cannot be read, or is not the file that is expected.
        CommandError: the name is none, or the disk is too small.
    """
    if local is not None and not local.is_dir():
        raise CommandError(f"--from {local}: no such folder")
    known = find_variant(variant)
    fetching = _Fetching(folder, local, known.repo if known else variant, revision)
    if known:
        fetching.announce([CHECKPOINT, *known.auxiliaries])
    files = fetching.take(CHECKPOINT)
    for name in needed_auxiliaries(folder):
        files += fetching.take(name)
    sums = sums_of(folder, files)
    write_whole(folder / SUMS_FILE, sums_text(sums))
    total = sum((folder / path).stat().st_size for path in sums)
    print(f"{folder}: {len(sums)} files, {size(total)}, each checked")


class _Fetching:
    """One run. A model is `CHECKPOINT` or the name of an auxiliary one, as checkpoints spell it."""

    def __init__(self, folder: Path, local: Path | None, repo: str, revision: str | None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.local, self.repo, self.revision = folder, local, repo, revision
        self.recorded = read_sources(folder)
        self.listings: dict[str, Listing] = {}

    def announce(self, models: list[str]) -> None:
        """Prints what is to be downloaded, before anything is."""
        listings = [self._listing(model) for model in models if self._local_folder(model) is None]
        print(f"{self.repo}: {size(sum(listing.total_bytes for listing in listings))} to download or check, in all")

    def take(self, model: str) -> list[str]:
        """Brings a model to its place; returns its files, relative to the folder."""
        place = _place(model)
        files = self._take_htdemucs() if place == f"hub/{HTDEMUCS}" else self._take(model, self.folder / place)
        return [(Path(place) / file).as_posix() for file in files]

    def _take(self, model: str, target: Path) -> list[str]:
        place, local = _place(model), self._local_folder(model)
        if local is not None:
            files = _wanted(model).choose({path.name for path in local.iterdir()}, str(local))
            require_space(self.folder, sum((local / file).stat().st_size for file in files))
            print(f"{local}: {len(files)} files to copy")
            return self._record(place, copy_local(local, files, target))
        before = self._before(model)
        if before is not None and sums_of(target, list(before.sums)) == before.sums:
            return list(before.sums)
        listing = self._listing(model)
        print(f"{listing.repo}@{listing.commit[:12]}: {len(listing.sizes)} files, {size(listing.total_bytes)}")
        require_space(self.folder, listing.missing_bytes(target))
        return self._record(place, download(listing, target, before.sums if before else {}))

    def _take_htdemucs(self) -> list[str]:
        # Imported here: demucs takes a while to import, and only melody models need it.
        from handler.conditioners.htdemucs import CONFIG_FILE, WEIGHTS_FILE, convert_htdemucs

        target, original = self.folder / _place(HTDEMUCS), self.folder / f".{HTDEMUCS}"
        converted = [CONFIG_FILE, WEIGHTS_FILE]
        there = all((target / file).is_file() for file in converted)
        if self._local_folder(HTDEMUCS) is not None or self._before(HTDEMUCS) is None or not there:
            self._take(HTDEMUCS, original)
            convert_htdemucs(original, target)
        shutil.rmtree(original, ignore_errors=True)
        return converted

    def _local_folder(self, model: str) -> Path | None:
        """The folder of `--from` that holds a model, if one does."""
        if self.local is None:
            return None
        if model == CHECKPOINT:
            return self.local if any((self.local / file).is_file() for file in CHECKPOINT_FILES) else None
        places = (self.local / _place(model), self.local / auxiliary_folder_name(model))
        return next((place for place in places if place.is_dir()), None)

    def _before(self, model: str) -> Source | None:
        """What an earlier run recorded of a model, if it is the one that is wanted now."""
        before = self.recorded.get(_place(model))
        if before is None or before.repo != self._repo(model):
            return None
        other = model == CHECKPOINT and self.revision not in (None, before.commit)
        return None if other else before

    def _repo(self, model: str) -> str:
        return self.repo if model == CHECKPOINT else find_auxiliary_model(model).repo

    def _listing(self, model: str) -> Listing:
        place, repo, before = _place(model), self._repo(model), self._before(model)
        if repo.count("/") != 1:
            raise CommandError(
                f"{repo}: neither a variant (see `list`) nor a hub id (owner/name); for a folder of this machine use "
                "--from"
            )
        if place not in self.listings:
            revision = before.commit if before else self.revision if model == CHECKPOINT else None
            self.listings[place] = list_remote(repo, _wanted(model), revision)
        return self.listings[place]

    def _record(self, place: str, source: Source) -> list[str]:
        self.recorded[place] = source
        write_sources(self.folder, self.recorded)
        return list(source.sums)


def _place(model: str) -> str:
    return CHECKPOINT if model == CHECKPOINT else f"hub/{auxiliary_folder_name(model)}"


def _wanted(model: str) -> Wanted:
    if model == CHECKPOINT:
        return Wanted(required=CHECKPOINT_FILES)
    known = find_auxiliary_model(model)
    if auxiliary_folder_name(model) == HTDEMUCS:
        # demucs' own files too, which a folder of this machine may hold.
        return Wanted(optional=known.files, one_of=(*known.weights, *HTDEMUCS_PICKLES))
    return Wanted(optional=known.files, one_of=known.weights)
