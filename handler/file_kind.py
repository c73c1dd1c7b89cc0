"""What a file is, judged by its first bytes, and what to do about one that is not what its name promises."""

from __future__ import annotations

import shlex
import zipfile
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path

_HEAD = 4096  # bytes that are looked at
_LEGACY_TORCH = 0x1950A86A20F9469CFC6C.to_bytes(10, "little")  # torch's magic number, which is pickled first
_MOST_SHOWN = 60  # characters of a text that a message quotes

_COMPRESSED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\0": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"7z\xbc\xaf\x27\x1c": ("7-Zip", "7z x"),
    b"Rar!": ("RAR", "unrar x"),
}
_OTHERS = {
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF\r\n\x1a\n": "an HDF5 file",
    b"GGUF": "a GGUF file, whose layout is llama.cpp's",
    b"RIFF": "a RIFF file, such as wav audio",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG image",
}


class Kind(Enum):
    """The kinds that readers tell apart; all the others are `OTHER`."""

    TORCH = auto()
    LEGACY_TORCH = auto()
    SAFETENSORS = auto()
    TAR = auto()
    COMPRESSED = auto()
    TEXT = auto()
    EMPTY = auto()
    OTHER = auto()


@dataclass(frozen=True, slots=True)
class FileKind:
    """What a file is.

    Attributes:
        kind: of which kind.
        what: the same as words, to follow "is".
        advice: what to do when something else was wanted; one or two sentences.
    """

    kind: Kind
    what: str
    advice: str

    @property
    def holds_torch(self) -> bool:
        """Whether `torch.load` reads files of this kind."""
        return self.kind in (Kind.TORCH, Kind.LEGACY_TORCH)


def file_kind(path: Path) -> FileKind:
    """Judge a file by its first bytes. Never raises for what is in it.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        head = file.read(_HEAD)
    if not head:
        return FileKind(Kind.EMPTY, "an empty file", _AGAIN)
    if head.startswith(b"PK\x03\x04"):
        return _zip_kind(path)
    if head[0] == 0x80 and _LEGACY_TORCH in head[:32]:
        return FileKind(Kind.LEGACY_TORCH, "a torch file in the format before torch 1.6", "Use it as a torch file.")
    if _is_safetensors(head):
        return FileKind(Kind.SAFETENSORS, "a safetensors file", "Use it under the name model.safetensors.")
    if head[257:262] == b"ustar":
        return FileKind(Kind.TAR, "a tar archive", f"Unpack it: `tar -xf {_quoted(path)}`.")
    for magic, (name, command) in _COMPRESSED.items():
        if head.startswith(magic):
            advice = f"Unpack it: `{command} {_quoted(path)}` (tar -xf if it is a compressed tar archive)."
            return FileKind(Kind.COMPRESSED, f"compressed by {name}", advice)
    for magic, what in _OTHERS.items():
        if head.startswith(magic):
            return FileKind(Kind.OTHER, what, _PUBLISHER)
    if head[0] == 0x80 and len(head) > 1 and 2 <= head[1] <= 5:
        return FileKind(
            Kind.OTHER,
            "a plain Python pickle",
            "Loading it could run its author's code, so it is refused; save tensors with torch.save, or get the file "
            "from its publisher again.",
        )
    if not any(head):
        return FileKind(Kind.OTHER, "filled with zero bytes, as a download that stopped leaves it", _AGAIN)
    return _text_kind(path, head) or FileKind(
        Kind.OTHER, f"of an unknown kind (its first bytes are {head[:8].hex(' ')})", f"It may be damaged. {_AGAIN}"
    )


def wrong_kind(path: Path, wanted: str, found: FileKind | None = None) -> str:
    """The message for a file of the wrong kind: what it is and what to do."""
    found = found or file_kind(path)
    return f"{path} cannot be read: it is {found.what}, not {wanted}. {found.advice}"


_AGAIN = "Download it again, for instance with `python -m archive_scripts fetch NAME FOLDER`."
_PUBLISHER = "Get the file that is wanted from its publisher, for instance with `python -m archive_scripts fetch`."


def _zip_kind(path: Path) -> FileKind:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError):
        return FileKind(Kind.OTHER, "the beginning of a torch or zip file: it is cut short or damaged", _AGAIN)
    roots = {name.partition("/")[0] for name in names}
    if len(roots) == 1 and any(name.endswith("/constants.pkl") for name in names):
        return FileKind(Kind.OTHER, "a TorchScript program", _PUBLISHER)
    if any(name.count("/") == 1 and name.endswith("/data.pkl") for name in names):
        return FileKind(Kind.TORCH, "a torch file", "Use it as a torch file.")
    if "MAR-INF/MANIFEST.json" in names:
        return FileKind(
            Kind.OTHER,
            "an archive of TorchServe",
            f"Serve it as it is: `python -m archive_scripts register {_quoted(path)}`.",
        )
    held = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
    advice = f"Unpack it: `unzip {_quoted(path)}`, and use what is inside."
    return FileKind(Kind.OTHER, f"a zip archive (of {held or 'nothing'})", advice)


def _text_kind(path: Path, head: bytes) -> FileKind | None:
    try:
        text = head.decode("utf-8-sig", "strict" if len(head) < _HEAD else "ignore").strip()
    except UnicodeDecodeError:
        return None
    if any(ord(character) < 32 and character not in "\t\n\r\f" for character in text):
        return None
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return FileKind(
            Kind.TEXT,
            "a Git LFS pointer, a few lines of text in the place of the file",
            f"Get the file itself: `cd {_quoted(path.parent)} && git lfs pull` (after `git lfs install`).",
        )
    if "/annex/objects/" in text[:200]:
        return FileKind(
            Kind.TEXT,
            "a git-annex pointer, a line of text in the place of the file",
            f"Get the file itself: `git -C {_quoted(path.parent)} annex get {_quoted(Path(path.name))}`.",
        )
    shown = " ".join(text.split())
    shown = shown[:_MOST_SHOWN] + ("…" if len(shown) > _MOST_SHOWN else "")
    lower = text.lower()
    if lower.startswith(("<!doctype html", "<html", "<head", "<body")) or "<html" in lower[:1000]:
        return FileKind(
            Kind.TEXT,
            "an HTML page",
            "A web page was saved in the place of the file, such as a login, an error, or the hub's page about it. "
            "Download the file itself: `python -m archive_scripts fetch NAME FOLDER`, or the hub's link with "
            "/resolve/ in the place of /blob/.",
        )
    if text.startswith("<"):
        return FileKind(Kind.TEXT, f"an XML text ({shown!r}), as a server's error is", _AGAIN)
    if text.startswith(("{", "[")):
        return FileKind(Kind.TEXT, f"a JSON text ({shown!r})", _AGAIN)
    return FileKind(Kind.TEXT, f"a text ({shown!r})", _AGAIN)


def _is_safetensors(head: bytes) -> bool:
    """A safetensors file is the length of its JSON header (8 bytes, little-endian), the header, and the tensors."""
    length = int.from_bytes(head[:8], "little")
    return head[8:9] == b"{" and 2 <= length <= 100_000_000  # as safetensors itself bounds it


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))
