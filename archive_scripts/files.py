"""Files on the disk: copying with checksums, room, and folders that appear only when they are complete."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from tqdm import tqdm

from archive_scripts.errors import CommandError
from archive_scripts.machine import size

SUMS_FILE = "SHA256SUMS"
BLOCK = 1 << 20


def progress(description: str, total: int) -> tqdm:
    """A bar of bytes, on a terminal only."""
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, leave=False, disable=None)


def copy_stream(source: BinaryIO, target: BinaryIO, bar: tqdm) -> str:
    """Copy to the end, and return the sha256 of what was copied, in hex."""
    digest = hashlib.sha256()
    while block := source.read(BLOCK):
        digest.update(block)
        target.write(block)
        bar.update(len(block))
    return digest.hexdigest()


def read_sha256(source: BinaryIO, bar: tqdm | None = None) -> str:
    """The sha256 of a stream from here to its end, in hex."""
    digest = hashlib.sha256()
    while block := source.read(BLOCK):
        digest.update(block)
        if bar is not None:
            bar.update(len(block))
    return digest.hexdigest()


def sums_text(sums: dict[str, str]) -> str:
    """Digests by path as `sha256sum --check` reads them: lines of `<sha256>  <path>`, sorted."""
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(sums.items()))


def parse_sums(text: str) -> dict[str, str]:
    """What `sums_text` wrote, by path.

    Raises:
        ValueError: for a line of another form.
    """
    sums = {}
    for line in text.splitlines():
        digest, separator, path = line.partition("  ")
        if not separator or len(digest) != 64 or not path:
            raise ValueError(f"not a line of sha256sum: {line[:100]!r}")
        sums[path] = digest
    return sums


def require_space(folder: Path, needed: int) -> None:
    """Raises CommandError where a disk has not the bytes needed, and a hundredth more."""
    free = shutil.disk_usage(folder).free
    if free < needed * 1.01:
        raise CommandError(f"{folder}: {size(needed)} are needed and {size(free)} are free on this disk")


def write_whole(path: Path, text: str) -> None:
    """Write a file that is there wholly or not at all."""
    beside = path.with_name(f".{path.name}.partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


@contextmanager
def workspace(output: Path, name: str) -> Iterator[Path]:
    """A hidden folder in `output` for what is not yet complete. It goes at the end, whatever the end is; one that a
    killed process left is cleared by the next of the same name."""
    output.mkdir(parents=True, exist_ok=True)
    for left in output.glob(f".{name}.*.partial"):
        with _locked(left) as alone:
            if alone:
                shutil.rmtree(left, ignore_errors=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{name}.", suffix=".partial", dir=output) as folder,
        _locked(Path(folder)),
    ):
        yield Path(folder)


def move_into_place(made: Path, target: Path) -> None:
    """Put a complete file or folder where it belongs, in the place of what is there. Both are on one disk.

    A file is replaced at once. A folder cannot be: for an instant there is none, and a process killed then leaves the
    old one beside `made`.
    """
    if not target.is_dir() or target.is_symlink():
        os.replace(made, target)
        return
    old = made.with_name(f"{made.name}.old")
    os.rename(target, old)
    try:
        os.rename(made, target)
    except BaseException:
        os.rename(old, target)
        raise


@contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Whether this process alone holds the folder; the system gives it back when a process ends, however it does."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        yield False
        return
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield True
    except BlockingIOError:
        yield False
    finally:
        os.close(descriptor)
