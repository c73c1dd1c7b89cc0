"""`export`: from a training checkpoint to the two files that are served."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archive_scripts.files import move_into_place, require_space, workspace
from archive_scripts.machine import size
from archive_scripts.training import Training, read_training
from handler.checkpoint import COMPRESSION_FILE, LM_FILE, Pointer, read_checkpoint
from handler.errors import CheckpointError

HELP = "export a fine-tune from audiocraft's training checkpoint"
DESCRIPTION = f"""\
Write {LM_FILE} and {COMPRESSION_FILE} into OUT, from a folder that audiocraft trained into (checkpoint.th, with FSDP or
without). The best state is taken, with its parameters as they are stored: float16 after training with autocast.

The codec is the one that the training configuration names (compression_model_checkpoint); one of the hub
(//pretrained/…) is written as a pointer to it. For one that was trained, give its folder or its exported file with
--compression.

  python -m archive_scripts export outputs/xps/97d170e1 my-finetune
  python -m archive_scripts pack my-finetune
"""
VERSION = "1.4.0a2"
"""The version of audiocraft whose exports these are like."""

PRETRAINED = "//pretrained/"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR", type=Path, help="a training folder, or its checkpoint")
    parser.add_argument("output", metavar="OUT", type=Path, help="the folder to write, made if need be")
    parser.add_argument(
        "--compression", metavar="CODEC", type=Path, help="training folder, or export, of the codec it was trained with"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    export(args.checkpoint, args.output, args.compression)
    written = [f"{file} {size((args.output / file).stat().st_size)}" for file in (LM_FILE, COMPRESSION_FILE)]
    print(f"{args.output}: {', '.join(written)}")


def export(checkpoint: Path, output: Path, compression: Path | None = None) -> None:
    """Write the exported files of a training run; the arguments are the command's.

    Raises:
        CheckpointError: a checkpoint cannot be read, is of another kind of model, or its codec is nowhere.
        CommandError: the disk is too small.
    """
    language_model = read_training(checkpoint)
    if not language_model.config.get("transformer_lm"):
        raise CheckpointError(
            f"{language_model.source} is no language model: its xp.cfg has no transformer_lm. "
            "A codec goes with --compression."
        )
    packages = {LM_FILE: _package(language_model), COMPRESSION_FILE: _codec(language_model, compression)}
    output.mkdir(parents=True, exist_ok=True)
    require_space(output, sum(_tensor_bytes(package) for package in packages.values()))
    with workspace(output, "export") as made:
        for file, package in packages.items():
            torch.save(package, made / file)
        for file in packages:
            move_into_place(made / file, output / file)


def _package(training: Training) -> dict[str, Any]:
    # A copy of each tensor, or its whole storage would be saved with it.
    state = {name: tensor.clone() for name, tensor in training.state.items()}
    return {"best_state": state, "xp.cfg": training.text, "version": VERSION, "exported": True}


def _codec(language_model: Training, compression: Path | None) -> dict[str, Any]:
    named = language_model.config.get("compression_model_checkpoint")
    if compression is not None:
        return _trained_codec(compression)
    if isinstance(named, str) and named.startswith(PRETRAINED) and len(named) > len(PRETRAINED):
        return {"pretrained": named.removeprefix(PRETRAINED), "exported": True, "version": VERSION}
    raise CheckpointError(
        f"{language_model.source}: its codec is {named!r} (compression_model_checkpoint), which is none of the hub's. "
        "Give the folder that it was trained into, or its exported file, with --compression."
    )


def _trained_codec(path: Path) -> dict[str, Any]:
    exported = path / COMPRESSION_FILE if path.is_dir() else path
    if exported.suffix == ".bin" and exported.is_file():
        found = read_checkpoint(exported)
        if isinstance(found, Pointer):
            return {"pretrained": found.name, "exported": True, "version": VERSION}
        package: dict[str, Any] = torch.load(exported, map_location="cpu", weights_only=True, mmap=True)
        return package
    training = read_training(path)
    if not training.config.get("compression_model"):
        raise CheckpointError(f"{training.source} is no codec: its xp.cfg has no compression_model.")
    return _package(training)


def _tensor_bytes(package: dict[str, Any]) -> int:
    state: dict[str, Tensor] = package.get("best_state", {})
    return sum(tensor.nbytes for tensor in state.values())
