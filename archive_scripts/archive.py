"""Builds an archive: what goes into it, and the file or folder itself.

Layout (paths inside the archive):

    checkpoint/state_dict.bin                byte for byte as published
    checkpoint/compression_state_dict.bin
    checkpoint/hub/<auxiliary>/…             only the files needed
    checkpoint/SHA256SUMS                    of every file above, as `sha256sum --check` reads it
    handler/…                                this project's package
    musicgen_handler.py                      the entry TorchServe imports
    model-config.yaml
    MAR-INF/MANIFEST.json
    MAR-INF/SHA256SUMS                       of every file outside checkpoint/

The same contents give the same bytes, whenever and wherever they are packed.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import yaml
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging_utils import ModelExportUtils
from tqdm import tqdm

from archive_scripts.errors import CommandError
from archive_scripts.files import SUMS_FILE, copy_stream, move_into_place, progress, require_space, sums_text
from archive_scripts.members import MANIFEST, open_archive
from archive_scripts.needs import codec_file, needed_auxiliaries
from handler.checkpoint import COMPRESSION_FILE, LM_FILE
from handler.model_folder import require_kind
from handler.registry import CHECKPOINT_FILES, HTDEMUCS, auxiliary_files, auxiliary_folder_name, find_auxiliary
from handler.settings import Settings

HANDLER_PACKAGE = Path(__file__).resolve().parents[1] / "handler"
ENTRY = "musicgen_handler.py"
CONFIG_FILE = "model-config.yaml"
CHECKPOINT = "checkpoint/"
CHECKPOINT_SUMS = f"{CHECKPOINT}{SUMS_FILE}"
OTHER_SUMS = f"MAR-INF/{SUMS_FILE}"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

FORMATS = ("zip-store", "no-archive")
"""`<name>.mar`, stored without compression, which would gain nothing; or a folder, which TorchServe serves in place."""

# The earliest time a zip can hold, so that no archive says when it was packed.
ZIP_EPOCH = (1980, 1, 1, 0, 0, 0)

# TorchServe's own keys. One request per handler call, several in flight (asyncCommunication); loading a large
# checkpoint may be slow; 2147483 s is the longest window TorchServe can count in which a dead worker is
# restarted.
TORCHSERVE_SETTINGS = {
    "minWorkers": 1,
    "maxWorkers": 1,
    "batchSize": 1,
    "maxBatchDelay": 1,
    "asyncCommunication": True,
    "startupTimeout": 1200,
    "maxRetryTimeoutInSec": 2_147_483,
}

AddMember = Callable[[str, BinaryIO, int, tqdm], str]
"""Writes a member: its path, its contents and size; gives its sha256."""


@dataclass(frozen=True, slots=True)
class Contents:
    """What an archive holds: files on disk by their path in the archive, and texts written for it."""

    files: Mapping[str, Path]
    texts: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def collect(
    checkpoint_folder: Path, made: Path, hub_dir: Path | None = None, handler: Mapping[str, object] | None = None
) -> Contents:
    """Everything an archive of this checkpoint holds, but for its manifest and checksums; auxiliary models may be
    downloaded.

    A codec that is only a pointer to a file on this machine is replaced by that file.

    Args:
        checkpoint_folder: as `handler.registry.resolve` gives it.
        made: a folder for what has to be converted first; needed until the archive is built.
        hub_dir: where auxiliary models are looked for first.
        handler: settings for the `handler:` block of model-config.yaml; the others are written with their
            defaults.

    Raises:
        CheckpointError: the checkpoint cannot be read, or an auxiliary model is nowhere.
    """
    files = {
        f"{CHECKPOINT}{LM_FILE}": checkpoint_folder / LM_FILE,
        f"{CHECKPOINT}{COMPRESSION_FILE}": codec_file(checkpoint_folder),
    }
    for name in needed_auxiliaries(checkpoint_folder):
        folder = find_auxiliary(name, checkpoint_folder, hub_dir)
        if auxiliary_folder_name(name) == HTDEMUCS:
            folder = _converted_htdemucs(folder, made)
        for file in auxiliary_files(name, folder):
            require_kind(folder / file)
            files[f"{CHECKPOINT}hub/{auxiliary_folder_name(name)}/{file.as_posix()}"] = folder / file
    files |= handler_files()
    settings = Settings.from_model_config({"handler": dict(handler or {})})
    config = TORCHSERVE_SETTINGS | {"handler": settings.model_dump(exclude_none=True)}
    return Contents(files, {CONFIG_FILE: yaml.safe_dump(config, sort_keys=False)})


def handler_files() -> dict[str, Path]:
    """The code an archive holds: this project's `handler` package, and its entry beside it."""
    files = {ENTRY: HANDLER_PACKAGE / ENTRY}
    for path in sorted(HANDLER_PACKAGE.rglob("*.py")):
        if path.name != ENTRY:
            files[f"handler/{path.relative_to(HANDLER_PACKAGE).as_posix()}"] = path
    return files


def check_names(name: str, version: str) -> None:
    """Raises CommandError for a name or version that TorchServe does not take."""
    if not NAME.fullmatch(name):
        raise CommandError(f"--name {name}: letters, digits, '_', '-' and '.' only, starting with a letter or digit")
    if not NAME.fullmatch(version):
        raise CommandError(f"--version {version}: letters, digits, '_', '-' and '.' only, such as 1.0")


def archive_path(output: Path, name: str, archive_format: str) -> Path:
    """Where `build` puts an archive."""
    return output / (f"{name}.mar" if archive_format == "zip-store" else name)


def build(
    contents: Contents, name: str, output: Path, made: Path, version: str = "1.0", archive_format: str = "zip-store"
) -> Path:
    """Write an archive and return its path (`archive_path`), where it appears only when it is complete.

    Args:
        contents: what it holds.
        name: of the model on the server.
        output: the model store.
        made: a folder on the same disk for the unfinished archive.
        version: of the model.
        archive_format: one of `FORMATS`.

    Raises:
        CommandError: the disk is too small, or a folder that is no archive is in the way.
    """
    target = archive_path(output, name, archive_format)
    if target.is_dir() and not (target / MANIFEST).is_file():
        raise CommandError(f"{target}: this folder is there and is no archive; choose another --name or --output")
    require_space(output, contents.total_bytes)
    unfinished = made / target.name
    members: dict[str, Path | str] = {**contents.files, **contents.texts, MANIFEST: _manifest(name, version)}
    sums: dict[str, str] = {}
    with (
        (_zip if archive_format == "zip-store" else _folder)(unfinished) as add,
        progress("archive", contents.total_bytes) as bar,
    ):

        def add_text(path: str, text: str) -> str:
            data = text.encode()
            return add(path, BytesIO(data), len(data), bar)

        for path, member in sorted(members.items()):
            if isinstance(member, str):
                sums[path] = add_text(path, member)
            else:
                with member.open("rb") as source:
                    sums[path] = add(path, source, member.stat().st_size, bar)
        inside = {path: digest for path, digest in sums.items() if path.startswith(CHECKPOINT)}
        add_text(CHECKPOINT_SUMS, sums_text({path.removeprefix(CHECKPOINT): inside[path] for path in inside}))
        add_text(OTHER_SUMS, sums_text({path: sums[path] for path in sums.keys() - inside.keys()}))
    move_into_place(unfinished, target)
    return target


def is_current(archive: Path, local_checkpoint: Path | None) -> bool:
    """Whether an archive is there and holds this tree's code and, of a checkpoint in a local folder, the files as they
    are now."""
    try:
        with open_archive(archive) as held:
            sizes = {member.path: member.size for member in held.members}
            code = {path: zlib.crc32(held.open(path).read()) for path in sizes if path.endswith(".py")}
            written = (archive / MANIFEST if archive.is_dir() else archive).stat().st_mtime
    except (CommandError, FileNotFoundError, zipfile.BadZipFile):
        return False
    files = {} if local_checkpoint is None else {file: local_checkpoint / file for file in CHECKPOINT_FILES}
    for file, path in files.items():
        status = path.stat()
        if status.st_mtime > written or status.st_size != sizes.get(f"{CHECKPOINT}{file}"):
            return False
    return code == {path: zlib.crc32(source.read_bytes()) for path, source in handler_files().items()}


def _converted_htdemucs(folder: Path, made: Path) -> Path:
    # Imported here: demucs takes a while to import, and only melody models need it.
    from handler.conditioners.htdemucs import convert_htdemucs

    convert_htdemucs(folder, made / HTDEMUCS)
    return made / HTDEMUCS


def _manifest(name: str, version: str) -> str:
    """As torch-model-archiver writes it, but for the time."""
    config = ModelArchiverConfig(
        model_name=name, handler=ENTRY, version=version, config_file=CONFIG_FILE, archive_format="zip-store"
    )
    manifest = json.loads(ModelExportUtils.generate_manifest_json(config))
    del manifest["createdOn"]
    return json.dumps(manifest, indent=2) + "\n"


@contextmanager
def _zip(path: Path) -> Iterator[AddMember]:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:

        def add(member: str, source: BinaryIO, size: int, bar: tqdm) -> str:
            info = zipfile.ZipInfo(member, ZIP_EPOCH)
            info.create_system, info.external_attr, info.file_size = 3, 0o100644 << 16, size
            with archive.open(info, "w") as target:
                return copy_stream(source, target, bar)  # type: ignore[arg-type]

        yield add


@contextmanager
def _folder(path: Path) -> Iterator[AddMember]:
    def add(member: str, source: BinaryIO, size: int, bar: tqdm) -> str:
        target = path / member
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("xb") as file:
            return copy_stream(source, file, bar)

    yield add
