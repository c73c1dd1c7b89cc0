"""Builds an archive: what goes into it, and the `.mar` file itself.

Layout (paths inside the archive):

    checkpoint/state_dict.bin                byte for byte as published
    checkpoint/compression_state_dict.bin
    checkpoint/hub/<auxiliary>/…             only the files needed
    checkpoint/SHA256SUMS                    as `sha256sum --check` reads it
    handler/…                                this project's package
    musicgen_handler.py                      the entry TorchServe imports
    model-config.yaml
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
import threading
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from model_archiver.model_archiver_config import ModelArchiverConfig
from model_archiver.model_packaging_utils import ModelExportUtils
from tqdm import tqdm

from archive_scripts.errors import CommandError
from archive_scripts.machine import size
from handler.checkpoint import COMPRESSION_FILE, LM_FILE, Checkpoint, Pointer, read_checkpoint
from handler.errors import CheckpointError
from handler.registry import CHECKPOINT_FILES, auxiliary_files, auxiliary_folder_name, find_auxiliary
from handler.settings import Settings

HANDLER_PACKAGE = Path(__file__).resolve().parents[1] / "handler"
ENTRY = "musicgen_handler.py"
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")

# A zip knows no time before 1980, yet some file systems say 1970.
ZIP_EPOCH = datetime(1980, 1, 2).timestamp()

# Conditioners that lean on one fixed model; T5's is named in the configuration.
CONDITIONER_AUXILIARIES = {"chroma_stem": "htdemucs", "style": "MERT-v1-95M"}

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


@dataclass(frozen=True, slots=True)
class Contents:
    """What an archive holds: files on disk by their path in the archive, and texts written for it."""

    files: Mapping[str, Path]
    texts: Mapping[str, str]

    @property
    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files.values())


def needed_auxiliaries(checkpoint_folder: Path) -> list[str]:
    """The auxiliary models a checkpoint names in its own files, as it spells them (`t5-base`, a codec's hub
    id).

    Raises:
        CheckpointError: a file of the checkpoint cannot be read.
    """
    names = []
    language_model = read_checkpoint(checkpoint_folder / LM_FILE)
    if not isinstance(language_model, Checkpoint):
        raise CheckpointError(f"{language_model.source} is a pointer; the language model cannot be one.")
    conditioners = language_model.config.section("conditioners")
    for name in conditioners:
        if name == "args":
            continue
        kind = conditioners.section(name).get("model")
        if kind == "t5":
            names.append(str(conditioners.section(name).section("t5")["name"]))
        elif kind in CONDITIONER_AUXILIARIES:
            names.append(CONDITIONER_AUXILIARIES[kind])
    compression_model = read_checkpoint(checkpoint_folder / COMPRESSION_FILE)
    if isinstance(compression_model, Pointer):
        names.append(compression_model.name)
    return names


def collect(
    checkpoint_folder: Path, hub_dir: Path | None = None, handler: Mapping[str, object] | None = None
) -> Contents:
    """Everything an archive of this checkpoint holds, but for its checksums; auxiliary models may be
    downloaded.

    Args:
        checkpoint_folder: as `handler.registry.resolve` gives it.
        hub_dir: where auxiliary models are looked for first.
        handler: settings for the `handler:` block of model-config.yaml; the others are written with their
            defaults.

    Raises:
        CheckpointError: the checkpoint cannot be read, or an auxiliary model is nowhere.
    """
    files = {f"checkpoint/{file}": checkpoint_folder / file for file in CHECKPOINT_FILES}
    for name in needed_auxiliaries(checkpoint_folder):
        folder = find_auxiliary(name, checkpoint_folder, hub_dir)
        for file in auxiliary_files(name, folder):
            files[f"checkpoint/hub/{auxiliary_folder_name(name)}/{file.as_posix()}"] = folder / file
    files |= handler_files()
    settings = Settings.from_model_config({"handler": dict(handler or {})})
    config = TORCHSERVE_SETTINGS | {"handler": settings.model_dump(exclude_none=True)}
    return Contents(files, {"model-config.yaml": yaml.safe_dump(config, sort_keys=False)})


def handler_files() -> dict[str, Path]:
    """The code an archive holds: this project's `handler` package, and its entry beside it."""
    files = {ENTRY: HANDLER_PACKAGE / ENTRY}
    for path in sorted(HANDLER_PACKAGE.rglob("*.py")):
        if path.name != ENTRY:
            files[f"handler/{path.relative_to(HANDLER_PACKAGE).as_posix()}"] = path
    return files


def build(contents: Contents, name: str, output: Path, version: str = "1.0") -> Path:
    """Write `<output>/<name>.mar`, appearing there only when complete, and return its path.

    Raises:
        CommandError: the name or version is not one TorchServe takes, or the disk is too small.
    """
    if not NAME.fullmatch(name):
        raise CommandError(f"--name {name}: letters, digits, '_', '-' and '.' only, starting with a letter or digit")
    if not NAME.fullmatch(version):
        raise CommandError(f"--version {version}: letters, digits, '_', '-' and '.' only, such as 1.0")
    output.mkdir(parents=True, exist_ok=True)
    free, needed = shutil.disk_usage(output).free, contents.total_bytes
    if free < needed * 1.01:
        raise CommandError(f"{output}: {size(needed)} are needed and {size(free)} are free on this disk")
    config = ModelArchiverConfig(
        model_name=name,
        handler=ENTRY,
        version=version,
        config_file="model-config.yaml",
        export_path=str(output),
        archive_format="zip-store",
    )
    # Staged as links: torch-model-archiver's own staging would copy every byte, into a folder named like the
    # model.
    with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=output) as beside:
        stage, made = Path(beside) / "stage", Path(beside) / f"{name}.mar"
        for path, source in contents.files.items():
            (stage / path).parent.mkdir(parents=True, exist_ok=True)
            if source.stat().st_mtime < ZIP_EPOCH:
                shutil.copyfile(source, stage / path)
            else:
                (stage / path).symlink_to(source.resolve())
        for path, text in contents.texts.items():
            (stage / path).write_text(text, encoding="utf-8")
        (stage / "checkpoint" / "SHA256SUMS").write_text(_checksums(contents), encoding="utf-8")
        with _growth(made, needed):
            manifest = ModelExportUtils.generate_manifest_json(config)
            ModelExportUtils.archive(beside, name, str(stage), manifest, "zip-store")
        os.replace(made, output / made.name)
    return output / f"{name}.mar"


def is_current(archive: Path, local_checkpoint: Path | None) -> bool:
    """Whether an archive holds this tree's code and, of a checkpoint in a local folder, the files as they are
    now."""
    try:
        with zipfile.ZipFile(archive) as held:
            members = {info.filename: info for info in held.infolist()}
    except (FileNotFoundError, zipfile.BadZipFile):
        return False
    files = {} if local_checkpoint is None else {file: local_checkpoint / file for file in CHECKPOINT_FILES}
    for file, path in files.items():
        status = path.stat()
        if status.st_mtime > archive.stat().st_mtime or status.st_size != members[f"checkpoint/{file}"].file_size:
            return False
    held_code = {path: member.CRC for path, member in members.items() if path.endswith(".py")}
    return held_code == {path: zlib.crc32(source.read_bytes()) for path, source in handler_files().items()}


def _checksums(contents: Contents) -> str:
    """Lines of `<sha256>  <path under checkpoint/>`."""
    sources = {path: source for path, source in contents.files.items() if path.startswith("checkpoint/")}
    total = sum(source.stat().st_size for source in sources.values())
    lines = []
    with _progress("checksums", total) as bar:
        for path, source in sorted(sources.items()):
            digest = hashlib.sha256()
            with source.open("rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
                    bar.update(len(block))
            lines.append(f"{digest.hexdigest()}  {path.removeprefix('checkpoint/')}\n")
    return "".join(lines)


@contextmanager
def _growth(path: Path, total: int) -> Iterator[None]:
    """Show how a file grows while another library writes it."""
    done = threading.Event()

    def watch() -> None:
        with _progress("archive", total) as bar:
            while not done.wait(0.2):
                if path.exists():
                    bar.update(path.stat().st_size - bar.n)

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()


def _progress(description: str, total: int) -> tqdm:
    # disable=None: only on a terminal
    return tqdm(total=total, desc=description, unit="B", unit_scale=True, leave=False, disable=None)
