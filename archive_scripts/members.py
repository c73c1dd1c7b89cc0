"""Reads an archive: a `.mar`, which is a zip file, or a folder of the same contents."""

from __future__ import annotations

import json
import os
import stat
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, cast

from archive_scripts.errors import CommandError

MANIFEST = "MAR-INF/MANIFEST.json"


@dataclass(frozen=True, slots=True)
class Member:
    """One entry of an archive: its path as written there, its size in bytes, whether it is a plain file."""

    path: str
    size: int
    is_file: bool


class Archive(ABC):
    """What is in an archive.

    Attributes:
        path: of the archive on the disk.
        members: its entries but for folders, and for what Python caches in a served folder.
    """

    path: Path
    members: list[Member]

    @abstractmethod
    def open(self, path: str) -> BinaryIO:
        """A plain member, to be read."""

    def read_text(self, path: str) -> str:
        with self.open(path) as file:
            return file.read().decode("utf-8")

    @property
    def total_bytes(self) -> int:
        return sum(member.size for member in self.members)


class ZippedArchive(Archive):
    def __init__(self, path: Path, held: zipfile.ZipFile) -> None:
        self.path, self._held = path, held
        self.members = [
            Member(info.filename, info.file_size, stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG))
            for info in held.infolist()
            if not info.is_dir()
        ]

    def open(self, path: str) -> BinaryIO:
        return cast(BinaryIO, self._held.open(path))


class FolderArchive(Archive):
    def __init__(self, path: Path) -> None:
        self.path = path
        self.members = sorted(_walk(path, ""), key=lambda member: member.path)

    def open(self, path: str) -> BinaryIO:
        return (self.path / path).open("rb")


@contextmanager
def open_archive(path: Path) -> Iterator[Archive]:
    """An archive to read, closed at the end.

    Raises:
        CommandError: it is neither a zip file nor a folder with a manifest.
    """
    if path.is_dir():
        if not (path / MANIFEST).is_file():
            raise CommandError(f"{path}: not an archive: this folder has no {MANIFEST}")
        yield FolderArchive(path)
        return
    if not path.is_file():
        raise CommandError(f"{path}: no such archive; one is a .mar file, or the folder of `pack --format no-archive`")
    try:
        held = zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise CommandError(f"{path}: not an archive, or cut short ({error}); pack it again") from error
    with held:
        yield ZippedArchive(path, held)


def is_archive(path: Path) -> bool:
    """Whether a path is that of an archive, by its looks."""
    return (path.is_file() and path.suffix == ".mar") or (path / MANIFEST).is_file()


def model_name(archive: Path) -> str:
    """What the server calls the model: the file's name without `.mar`, or what a folder's manifest says, as the folder
    may be mounted anywhere."""
    if archive.is_dir():
        with suppress(OSError, KeyError, TypeError, ValueError):
            return str(json.loads((archive / MANIFEST).read_text())["model"]["modelName"])
    return archive.name.removesuffix(".mar")


def _walk(folder: Path, prefix: str) -> Iterator[Member]:
    with os.scandir(folder) as entries:
        for entry in entries:
            path = prefix + entry.name
            if entry.is_dir(follow_symlinks=False):
                if entry.name != "__pycache__":
                    yield from _walk(Path(entry.path), f"{path}/")
            else:
                status = entry.stat(follow_symlinks=False)
                yield Member(path, status.st_size, stat.S_ISREG(status.st_mode))
