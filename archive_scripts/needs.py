"""The auxiliary models a checkpoint needs, read from its own files."""

from __future__ import annotations

import os
from pathlib import Path

from handler.checkpoint import COMPRESSION_FILE, LM_FILE, Checkpoint, Config, Pointer, read_checkpoint
from handler.compression.pretrained import DAC, DEBUG
from handler.errors import CheckpointError

_PRETRAINED = "//pretrained/"  # how configs mark a model of the hub


def needed_auxiliaries(checkpoint_folder: Path) -> list[str]:
    """The auxiliary models a checkpoint names, as `find_auxiliary` takes them (`t5-base`, a codec's hub id), each once.

    Raises:
        CheckpointError: a file of the checkpoint cannot be read.
    """
    language_model = read_checkpoint(checkpoint_folder / LM_FILE)
    if not isinstance(language_model, Checkpoint):
        raise CheckpointError(f"{language_model.source} is a pointer; the language model cannot be one.")
    conditioners = language_model.config.section("conditioners")
    names: list[str] = []
    for name in conditioners:
        if name != "args":
            names += _of_conditioner(conditioners.section(name))
    codec = read_checkpoint(codec_file(checkpoint_folder))
    if isinstance(codec, Pointer):
        names += _of_codec(codec.name)
    return list(dict.fromkeys(names))


def codec_file(checkpoint_folder: Path) -> Path:
    """The file of a checkpoint's codec: its own, or the export on this machine that it points to.

    Raises:
        CheckpointError: a file cannot be read, or the pointers go in a circle.
    """
    path, seen = Path(os.path.normpath(checkpoint_folder / COMPRESSION_FILE)), list[Path]()
    while path not in seen:
        seen.append(path)
        pointer = read_checkpoint(path)
        if not isinstance(pointer, Pointer) or pointer.name in (*DAC, DEBUG):
            return path
        if pointer.local_file is None:
            return path
        path = pointer.local_file
    raise CheckpointError(f"{seen[0]} points to {path}, which points back to itself.")


def _of_conditioner(conditioner: Config) -> list[str]:
    kind = conditioner.get("model")
    if kind == "t5":
        return [str(conditioner.section("t5").get("name"))]
    if kind == "chroma_stem":
        return ["htdemucs"]
    if kind == "style":
        style = conditioner.section("style")
        if style.get("model_name") == "mert":
            return ["MERT-v1-95M"]
        return _of_codec(str(style.get("encodec_checkpoint")).removeprefix(_PRETRAINED))
    return []


def _of_codec(name: str) -> list[str]:
    return [] if name == DEBUG else [DAC.get(name, name)]
