"""`verify`: check that an archive is whole, safe and serves."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from archive_scripts.archive import (
    CHECKPOINT,
    CHECKPOINT_SUMS,
    CONFIG_FILE,
    ENTRY,
    NAME,
    OTHER_SUMS,
    TORCHSERVE_SETTINGS,
)
from archive_scripts.errors import CommandError
from archive_scripts.files import parse_sums, progress, read_sha256, require_space
from archive_scripts.members import MANIFEST, Archive, open_archive
from archive_scripts.needs import needed_auxiliaries
from handler.errors import CheckpointError, ModelDivergedError
from handler.model_folder import require_kind
from handler.registry import CHECKPOINT_FILES, auxiliary_files, auxiliary_folder_name
from handler.settings import Settings, SettingsError

HELP = "check that an archive is whole, safe and serves"
DESCRIPTION = """\
Check an archive, a .mar file or the folder of `pack --format no-archive`: that no path leads out of it, the checksums
of every file, the manifest, model-config.yaml, that every auxiliary model is inside, and that the model can be rebuilt
and makes a short clip (which needs the memory and the time of loading it on a CPU): a weight that is NaN or infinite is
named. Nothing is downloaded.

The exit code is 0 when all of it holds, 1 when something does not, 2 when there is no archive to check.
"""

CLIP_SECONDS = 0.2
"""Of the clip that a rebuilt model must be able to make."""

# TorchServe's other keys that an operator may set in model-config.yaml.
OPTIONAL_KEYS = frozenset(
    {
        "responseTimeout",
        "deviceType",
        "deviceIds",
        "parallelType",
        "parallelLevel",
        "jobQueueSize",
        "clientTimeoutInMills",
    }
)


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "verify", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("archive", metavar="ARCHIVE", type=Path, help="a .mar file, or the folder of an archive")
    parser.add_argument("--no-rebuild", action="store_true", help="do not rebuild the model, which takes longest")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    problems = 0
    for check, found in verify(args.archive, rebuild=not args.no_rebuild):
        print(f"{'FAILED' if found else 'ok':8}{check}", *(f"\n        {problem}" for problem in found), sep="")
        problems += len(found)
    print(f"{args.archive}: {f'{problems} problems' if problems > 1 else '1 problem' if problems else 'good'}")
    return 1 if problems else 0


def verify(path: Path, rebuild: bool = True) -> Iterator[tuple[str, list[str]]]:
    """The checks of an archive, one after the other: what is checked, and what is wrong with it.

    They stop where what follows could not be trusted: after paths that lead out of the archive, and after damaged
    files.

    Raises:
        CommandError: there is no archive at the path, or no room to unpack it.
    """
    with open_archive(path) as archive:
        checks: list[tuple[str, Callable[[Archive], list[str]]]] = [
            (f"paths of {len(archive.members)} files", _wrong_paths),
            ("checksums", _wrong_sums),
            ("manifest", _wrong_manifest),
            (CONFIG_FILE, _wrong_config),
        ]
        for name, check in checks:
            found = check(archive)
            yield name, found
            if found and check in (_wrong_paths, _wrong_sums):
                return
        with _unpacked(archive) as folder:
            found = _missing_auxiliaries(folder / CHECKPOINT)
            yield "auxiliary models", found
            if rebuild and not found:
                yield from _rebuilt(folder / CHECKPOINT)


def require_whole_checkpoint(folder: Path) -> None:
    """Checks the checkpoint in the folder of an archive; that of a `.mar` is checked as it is unpacked. The rest may be
    changed by its owner.

    Raises:
        CommandError: a file is missing, or not as it was packed.
    """
    with open_archive(folder) as archive:
        try:
            recorded = parse_sums(archive.read_text(CHECKPOINT_SUMS))
        except (ValueError, KeyError, OSError) as error:
            raise CommandError(f"{folder}: {CHECKPOINT_SUMS} cannot be read ({error}); pack it again") from error
        if found := _differences(archive, {CHECKPOINT + file: digest for file, digest in recorded.items()}):
            raise CommandError(f"{folder}: {found[0]}; pack it again")


def _wrong_paths(archive: Archive) -> list[str]:
    found, seen = [], set()
    for member in archive.members:
        parts = PurePosixPath(member.path).parts
        if (
            member.path.startswith("/")
            or ".." in parts
            or "\\" in member.path
            or "\0" in member.path
            or ":" in parts[0]
        ):
            found.append(f"{member.path!r} leads out of the archive")
        elif not member.is_file:
            found.append(f"{member.path} is a link or another thing that is no file")
        elif member.path in seen:
            found.append(f"{member.path} is there twice")
        seen.add(member.path)
    needed = {
        MANIFEST,
        CONFIG_FILE,
        ENTRY,
        CHECKPOINT_SUMS,
        OTHER_SUMS,
        *(CHECKPOINT + file for file in CHECKPOINT_FILES),
    }
    return found + [f"{path} is missing" for path in sorted(needed - seen)]


def _wrong_sums(archive: Archive) -> list[str]:
    found, sums = [], dict[str, str]()
    for path, prefix in ((CHECKPOINT_SUMS, CHECKPOINT), (OTHER_SUMS, "")):
        try:
            sums |= {prefix + file: digest for file, digest in parse_sums(archive.read_text(path)).items()}
        except (ValueError, zipfile.BadZipFile) as error:
            found.append(f"{path} is damaged: {error}")
    if found:
        return found
    present = {member.path for member in archive.members} - {CHECKPOINT_SUMS, OTHER_SUMS}
    found += [f"{path} has no checksum: it was not packed with the others" for path in sorted(present - sums.keys())]
    return found + _differences(archive, sums)


def _differences(archive: Archive, sums: Mapping[str, str]) -> list[str]:
    """What is wrong with the files that these are the checksums of."""
    sizes = {member.path: member.size for member in archive.members}
    found = [f"{path} is missing" for path in sorted(sums.keys() - sizes.keys())]
    present = sorted(sizes.keys() & sums.keys())
    with progress("checksums", sum(sizes[path] for path in present)) as bar:
        for path in present:
            try:
                with archive.open(path) as file:
                    digest = read_sha256(file, bar)
            except (zipfile.BadZipFile, OSError) as error:
                found.append(f"{path} is damaged: {error}")
                continue
            if digest != sums[path]:
                found.append(f"{path} is damaged or was changed after packing: its sha256 is not the one recorded")
    return found


def _wrong_manifest(archive: Archive) -> list[str]:
    try:
        model = json.loads(archive.read_text(MANIFEST))["model"]
        name, version = str(model["modelName"]), str(model["modelVersion"])
    except (KeyError, TypeError, ValueError) as error:
        return [f"{MANIFEST} is not one of TorchServe's: {type(error).__name__} {error}"]
    found = [
        f"model.{key} is {model.get(key)!r}, not {value!r}"
        for key, value in (("handler", ENTRY), ("configFile", CONFIG_FILE))
        if model.get(key) != value
    ]
    for key, value in (("modelName", name), ("modelVersion", version)):
        if not NAME.fullmatch(value):
            found.append(f"model.{key} is {value!r}; letters, digits, '_', '-' and '.' only")
    return found


def _wrong_config(archive: Archive) -> list[str]:
    try:
        config = yaml.safe_load(archive.read_text(CONFIG_FILE))
    except (ValueError, yaml.YAMLError) as error:
        return [f"not YAML: {error}"]
    if not isinstance(config, dict):
        return ["not a block of `key: value` lines"]
    found = [f"{key} is missing" for key in TORCHSERVE_SETTINGS if key not in config]
    found += [
        f"{key} is no key of TorchServe that this handler goes with"
        for key in config
        if key not in (*TORCHSERVE_SETTINGS, *OPTIONAL_KEYS, "handler")
    ]
    for key, value in config.items():
        needed = TORCHSERVE_SETTINGS.get(key)
        if needed is None:
            continue
        if type(value) is not type(needed) or value is False or value < 1:
            found.append(f"{key} is {value!r}; it must be {'true' if needed is True else 'a whole number, 1 or more'}")
        elif key == "batchSize" and value != 1:
            found.append(f"batchSize is {value}; with asyncCommunication it must be 1")
        elif key == "maxRetryTimeoutInSec" and value > TORCHSERVE_SETTINGS[key]:
            found.append(
                f"maxRetryTimeoutInSec is {value}; above {TORCHSERVE_SETTINGS[key]} TorchServe cannot count it"
            )
    try:
        Settings.from_model_config(config)
    except SettingsError as error:
        found.append(str(error))
    return found


def _missing_auxiliaries(checkpoint: Path) -> list[str]:
    try:
        needed = needed_auxiliaries(checkpoint)
    except CheckpointError as error:
        return [str(error)]
    found = []
    for name in needed:
        folder = checkpoint / "hub" / auxiliary_folder_name(name)
        if not folder.is_dir():
            found.append(f"{name}: there is no {CHECKPOINT}hub/{folder.name}")
            continue
        try:
            for file in auxiliary_files(name, folder):
                require_kind(folder / file)
        except CheckpointError as error:
            found.append(f"{name}: {error}")
    return found


def _rebuilt(checkpoint: Path) -> Iterator[tuple[str, list[str]]]:
    from handler.musicgen import MusicGen

    try:
        model = MusicGen.get_pretrained(checkpoint, device="cpu", hub_dir=checkpoint / "hub")
        model.set_generation_params(duration=CLIP_SECONDS, seed=0)
        model.generate(["verify"])
    except (CheckpointError, ModelDivergedError) as error:
        yield "the model rebuilds", [str(error)]
        return
    sound = f"{model.sample_rate} Hz, {'stereo' if model.audio_channels == 2 else 'mono'}"
    yield f"the model rebuilds: {sound}, conditioned on {', '.join(model.conditioners)}", []


@contextmanager
def _unpacked(archive: Archive) -> Iterator[Path]:
    """A folder with the members whose paths were found harmless; the archive's own where it is one."""
    if archive.path.is_dir():
        yield archive.path
        return
    require_space(Path(tempfile.gettempdir()), archive.total_bytes)
    with tempfile.TemporaryDirectory(prefix="musicgen-verify-") as folder:
        for member in archive.members:
            if member.path.startswith(CHECKPOINT):
                target = Path(folder) / member.path
                target.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member.path) as source, target.open("wb") as file:
                    shutil.copyfileobj(source, file, 1 << 20)
        yield Path(folder)
