"""Names an operator types -> folders that hold a checkpoint, and the auxiliary models beside it.

A checkpoint is a folder with `state_dict.bin` (language model) and `compression_state_dict.bin` (codec). What
the checkpoint does not contain (T5, a codec stored by reference, demucs, MERT) is an auxiliary model: a
folder of its own, named like the last part of its hub id.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from handler.checkpoint import COMPRESSION_FILE, LM_FILE, export_command, read_checkpoint
from handler.errors import CheckpointError
from handler.hub import hub_snapshot
from handler.model_folder import WEIGHTS

CHECKPOINT_FILES = (LM_FILE, COMPRESSION_FILE)
TRAINING_FILE = "checkpoint.th"
"""What audiocraft trains into."""

_SUFFIXES = (".bin", ".th", ".pt", ".pth", ".tar", ".gz", ".ckpt", ".safetensors")
"""Of files that hold models."""

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True, slots=True)
class Variant:
    """One published checkpoint.

    Attributes:
        name: the short name, such as `stereo-melody`.
        repo: its hub id.
        conditioners: what steers it: `description` (text) and perhaps `melody` or `style` (audio).
        auxiliaries: the auxiliary models it needs, by folder name.
        parameters: size class, as published.
        dim, heads, layers: the transformer.
        channels: 1 (mono) or 2 (stereo).
        sample_rate: of the audio it makes, in Hz.
        checkpoint_bytes: size of both files together, None where nobody has said.
    """

    name: str
    repo: str
    conditioners: tuple[str, ...]
    auxiliaries: tuple[str, ...]
    parameters: str
    dim: int
    heads: int
    layers: int
    channels: int
    sample_rate: int
    checkpoint_bytes: int | None


@dataclass(frozen=True, slots=True)
class Auxiliary:
    """A model the checkpoints lean on. `files` are needed, where there are any; of `weights`, the first there is.

    A codec may be in audiocraft's own layout (`compression_state_dict.bin`) or in transformers'.
    """

    repo: str
    files: tuple[str, ...]
    weights: tuple[str, ...]


_CODEC = 236_001_935
_T5 = ("t5-base",)
_T5_CODEC = ("t5-base", "encodec_32khz")
_T5_MELODY = ("t5-base", "htdemucs")
_T5_MELODY_CODEC = ("t5-base", "htdemucs", "encodec_32khz")
_TEXT, _MELODY, _STYLE = ("description",), ("description", "melody"), ("description", "style")
_SMALL, _MEDIUM, _LARGE = ("300M", 1024, 16, 24), ("1.5B", 1536, 24, 48), ("3.3B", 2048, 32, 48)


def _musicgen(
    name: str,
    conditioners: tuple[str, ...],
    auxiliaries: tuple[str, ...],
    size: tuple[str, int, int, int],
    checkpoint_bytes: int,
) -> Variant:
    channels = 2 if name.startswith("stereo-") else 1
    repo = f"facebook/musicgen-{name}"
    return Variant(name, repo, conditioners, auxiliaries, *size, channels, 32_000, checkpoint_bytes)


VARIANTS: dict[str, Variant] = {
    variant.name: variant
    for variant in (
        _musicgen("small", _TEXT, _T5, _SMALL, 841_000_000 + _CODEC),
        _musicgen("medium", _TEXT, _T5, _MEDIUM, 3_677_668_599 + _CODEC),
        _musicgen("large", _TEXT, _T5, _LARGE, 6_514_108_999 + _CODEC),
        _musicgen("melody", _MELODY, _T5_MELODY, _MEDIUM, 2_770_000_000 + _CODEC),
        _musicgen("melody-large", _MELODY, _T5_MELODY_CODEC, _LARGE, 4_900_000_000),
        _musicgen("stereo-small", _TEXT, _T5_CODEC, _SMALL, 870_000_000),
        _musicgen("stereo-medium", _TEXT, _T5_CODEC, _MEDIUM, 3_730_000_000),
        _musicgen("stereo-large", _TEXT, _T5_CODEC, _LARGE, 6_580_000_000),
        _musicgen("stereo-melody", _MELODY, _T5_MELODY_CODEC, _MEDIUM, 2_820_000_000),
        _musicgen("stereo-melody-large", _MELODY, _T5_MELODY_CODEC, _LARGE, 4_970_000_000),
        _musicgen("style", _STYLE, ("t5-base", "MERT-v1-95M"), _MEDIUM, 2_840_000_000 + _CODEC),
        Variant(
            "audiogen-medium",
            "facebook/audiogen-medium",
            _TEXT,
            ("t5-large",),
            *_MEDIUM,
            channels=1,
            sample_rate=16_000,
            checkpoint_bytes=None,
        ),
    )
}

DEBUG = "debug"
"""The name of the tiny model with random weights that `handler.debug_model` writes: for trials and tests."""

HTDEMUCS = "htdemucs"
HTDEMUCS_PICKLES = ("htdemucs.th", "955717e8-8726e21a.th")
"""What demucs itself publishes of htdemucs; `handler.conditioners.htdemucs` reads and converts these."""

_TRANSFORMERS_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model")

AUXILIARIES: dict[str, Auxiliary] = {
    "t5-small": Auxiliary("google-t5/t5-small", _TRANSFORMERS_FILES, WEIGHTS),
    "t5-base": Auxiliary("google-t5/t5-base", _TRANSFORMERS_FILES, WEIGHTS),
    "t5-large": Auxiliary("google-t5/t5-large", _TRANSFORMERS_FILES, WEIGHTS),
    "encodec_32khz": Auxiliary("facebook/encodec_32khz", ("config.json",), (COMPRESSION_FILE, *WEIGHTS)),
    "dac_44khz": Auxiliary("descript/dac_44khz", ("config.json",), WEIGHTS),
    "dac_24khz": Auxiliary("descript/dac_24khz", ("config.json",), WEIGHTS),
    "MERT-v1-95M": Auxiliary("m-a-p/MERT-v1-95M", ("config.json",), WEIGHTS),
    # As the hub has it, or as `handler.conditioners.htdemucs.convert_htdemucs` writes it.
    HTDEMUCS: Auxiliary("adefossez/HTDemucs", ("htdemucs.json",), ("955717e8.safetensors", "htdemucs.safetensors")),
}

REVISIONS = {
    "facebook/musicgen-small": "4c8334b02c6ec4e8664a91979669a501ec497792",
    "facebook/musicgen-large": "15ccdc92099879e47b6da12c350cdb71d4eab3ca",
    "google-t5/t5-base": "a9723ea7f1b39c1eae772870f3b547bf6ef7e6c1",
    "google-t5/t5-large": "150ebc2c4b72291e770f58e6057481c8d2ed331a",
    "m-a-p/MERT-v1-95M": "12af15fef9d0ac838c3f475bfbbf26d2060dd4f5",
    "adefossez/HTDemucs": "bf35a81b663819a8255c8fefee17f9d812b786b5",
}
"""The commit that `archive_scripts fetch` takes of a repository; of the others it takes `main`, and records which
commit that was."""

_CODEC_SHA256 = "37d256b5"
SHA256 = {
    ("facebook/musicgen-medium", COMPRESSION_FILE): _CODEC_SHA256,
    ("facebook/musicgen-large", COMPRESSION_FILE): _CODEC_SHA256,
    ("facebook/musicgen-melody", COMPRESSION_FILE): _CODEC_SHA256,
    ("google-t5/t5-base", "model.safetensors"): "a90903540cc02cbeb7ff9f823f1a80eb778c7e22426a0e620b01c77a5ec8f5b4",
    ("adefossez/HTDemucs", "955717e8.safetensors"): "d9fa14133cfcc034a6758923bb3a8ca9f8dfd0b582134643bbf83f72c17576dd",
}
"""How the sha256 of a published file begins, by repository and file, where it is known."""


def find_variant(name: str) -> Variant | None:
    """The variant that `name` spells: `small`, `musicgen-small` or `facebook/musicgen-small`, in any case."""
    spelled = name.lower()
    for variant in VARIANTS.values():
        if spelled in (variant.name, variant.repo, variant.repo.removeprefix("facebook/")):
            return variant
    return None


def resolve(
    name_or_path: str | Path,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder holding both checkpoint files, downloaded from the hub if need be.

    Args:
        name_or_path: a registry name (`small`, `musicgen-small`), `debug`, a folder, one of the two files in
            a folder, or any hub id `owner/name`. A registry name wins over a folder of the same name; write
            `./small` for that.
        revision: branch, tag or commit on the hub.
        token: hub token; None uses the one stored by `hf auth login` or `HF_TOKEN`, if any.
        cache_dir: where hub downloads are kept; None is Hugging Face's own cache. `HF_HUB_OFFLINE=1` is
            respected.

    Raises:
        CheckpointError: no such name, folder, file or repository, or the download failed; the message says
            what to do.
    """
    name = str(name_or_path)
    if name.lower() == DEBUG:
        from handler.debug_model import cached_debug_checkpoint

        return cached_debug_checkpoint(cache_dir)
    if variant := find_variant(name):
        return _download(variant.repo, CHECKPOINT_FILES, revision, token, cache_dir)
    path = Path(name).expanduser()
    if path.is_dir():
        return _checkpoint_folder(path)
    if path.is_file():
        return _checkpoint_folder_of(path)
    if _looks_like_a_path(name):
        raise CheckpointError(
            f"{name}: no such file or folder. A checkpoint is a folder with {' and '.join(CHECKPOINT_FILES)}."
        )
    if _HUB_ID.fullmatch(name):
        return _download(name, CHECKPOINT_FILES, revision, token, cache_dir)
    raise CheckpointError(_unknown(name))


def find_auxiliary(
    name: str,
    checkpoint_folder: str | Path,
    hub_dir: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of an auxiliary model: in `hub_dir`, else in `<checkpoint_folder>/hub`, else on the Hugging
    Face hub.

    Args:
        name: as configs spell it: a name or a hub id (`t5-base`, `facebook/encodec_32khz`, `htdemucs`). Its
            folder is named like the id's last part.
        checkpoint_folder: the folder `resolve` gave.
        hub_dir: a folder of auxiliary models, one subfolder each.
        revision, token, cache_dir: as in `resolve`.

    Raises:
        CheckpointError: it is nowhere; the message lists where it was looked for.
    """
    folder_name = auxiliary_folder_name(name)
    places = [Path(hub_dir).expanduser()] if hub_dir is not None else []
    places.append(Path(checkpoint_folder) / "hub")
    for place in places:
        if (place / folder_name).is_dir():
            return place / folder_name
    try:
        return _download_auxiliary(name, revision, token, cache_dir)
    except CheckpointError as error:
        looked = " and ".join(str(place / folder_name) for place in places)
        raise CheckpointError(f"the auxiliary model {name} is not at {looked}, and from the hub: {error}") from error


def auxiliary_folder_name(name: str) -> str:
    """`facebook/encodec_32khz` -> `encodec_32khz`."""
    return name.rsplit("/", 1)[-1]


def auxiliary_files(name: str, folder: Path) -> list[Path]:
    """The files that serving needs of an auxiliary model's folder, relative to it: one file of weights, no
    duplicates in other frameworks' formats. A model not in `AUXILIARIES` is taken for a transformers one.

    Raises:
        CheckpointError: the folder holds no weights.
    """
    known = find_auxiliary_model(name)
    wanted = [Path(file) for file in known.files if (folder / file).is_file()]
    for weights in known.weights:
        if (folder / weights).is_file():
            return [*wanted, Path(weights)]
    raise CheckpointError(f"{folder}: no weights in this folder; one of {', '.join(known.weights)} is needed")


def _checkpoint_folder(folder: Path) -> Path:
    missing = [file for file in CHECKPOINT_FILES if not (folder / file).is_file()]
    if not missing:
        return folder
    raise CheckpointError(
        f"{folder}: {' and '.join(missing)} missing. A checkpoint folder holds "
        f"{' and '.join(CHECKPOINT_FILES)}, as audiocraft exports them and as the hub has them.{_instead(folder)}"
    )


def _instead(folder: Path) -> str:
    """What can be made of the files that are there instead."""
    if (folder / LM_FILE).is_file():
        command = export_command(folder / LM_FILE).rstrip(".")
        return (
            f" {command}, which takes the codec that its xp.cfg names; add --base and the model that it was trained "
            "from to take that one's."
        )
    if (folder / TRAINING_FILE).is_file():
        return f" This is a training folder. {export_command(folder)}"
    others = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix in _SUFFIXES)
    if len(others) != 1 or others[0].name in CHECKPOINT_FILES:
        return ""
    try:
        read_checkpoint(others[0])
    except CheckpointError as error:
        return f" {error}"  # it names the command for this kind of file
    return f" {export_command(others[0])}"


def _checkpoint_folder_of(file: Path) -> Path:
    if file.name not in CHECKPOINT_FILES:
        try:
            read_checkpoint(file)
            advice = f"Rename it, and keep the other one beside it. Or: {export_command(file)}"
        except CheckpointError as error:
            advice = str(error)
        raise CheckpointError(f"{file}: an exported file is named {' or '.join(CHECKPOINT_FILES)}. {advice}")
    return _checkpoint_folder(file.parent)


def _looks_like_a_path(name: str) -> bool:
    return name.startswith((".", "~", "/")) or name.count("/") > 1 or name.endswith(_SUFFIXES)


def _unknown(name: str) -> str:
    names = [*VARIANTS, DEBUG]
    spelled = name.lower().removeprefix("musicgen-")
    close = difflib.get_close_matches(spelled, names, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(close)}? " if close else ""
    return (
        f"{name}: no variant or folder of this name. {hint}"
        f"Known variants: {', '.join(names)}. A hub id is written owner/name."
    )


def find_auxiliary_model(name: str) -> Auxiliary:
    """What is known of an auxiliary model; one that is not is taken for a transformers one on the hub."""
    known = AUXILIARIES.get(auxiliary_folder_name(name))
    if known is None or ("/" in name and name != known.repo):
        return Auxiliary(name, _TRANSFORMERS_FILES, (COMPRESSION_FILE, *WEIGHTS))
    return known


def _download_auxiliary(name: str, revision: str | None, token: str | None, cache_dir: str | Path | None) -> Path:
    known = find_auxiliary_model(name)
    for weights in known.weights:
        folder = hub_snapshot(known.repo, (*known.files, weights), revision, token, cache_dir)
        if (folder / weights).is_file():
            return folder
    raise CheckpointError(f"{known.repo} has none of {', '.join(known.weights)}")


def _download(
    repo: str, files: Iterable[str], revision: str | None, token: str | None, cache_dir: str | Path | None
) -> Path:
    files = tuple(files)
    folder = hub_snapshot(repo, files, revision, token, cache_dir)
    missing = [file for file in files if not (folder / file).is_file()]
    if not missing:
        return folder
    raise CheckpointError(
        f"{repo}: {' and '.join(missing)} not found there. Only repositories with audiocraft's export "
        f"({' and '.join(CHECKPOINT_FILES)}) can be used; if the download was cut short while you are "
        "offline, run it again with network access."
    )
