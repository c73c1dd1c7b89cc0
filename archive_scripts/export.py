"""`export`: from what a fine-tune left to the two files that are served."""

from __future__ import annotations

import argparse
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from archive_scripts.files import move_into_place, require_space, workspace
from archive_scripts.machine import size
from archive_scripts.needs import codec_file, needed_auxiliaries
from archive_scripts.training import Training, read_training, training_file
from handler.builders import build_language_model
from handler.checkpoint import COMPRESSION_FILE, LM_FILE, Checkpoint, Pointer, read_checkpoint
from handler.errors import CheckpointError
from handler.finite import require_finite
from handler.registry import auxiliary_folder_name, resolve
from handler.torch_file import read_torch_file

HELP = "export a fine-tune, so that it can be served"
DESCRIPTION = f"""\
Write {LM_FILE} and {COMPRESSION_FILE} into OUT, from what a fine-tune left: a folder that audiocraft trained into
(checkpoint.th, with FSDP or without), a fine-tuner's file with its xp.cfg in it (trained_model.tar), an export under
another name, or the parameters alone (a state_dict, such as lm_final.pt; in torch's format or safetensors). Tar
archives and compression are opened, and what wrappers put before the names of parameters (module., _orig_mod., model.,
lm.) is taken off. The best state is taken, else the last one, with its parameters as they are stored: float16 after
training with autocast.

Parameters alone need the model that they were trained from: --base takes what `pack` takes, and gives the xp.cfg and
the codec.

The codec is that of --compression, else that of --base, else the {COMPRESSION_FILE} beside the checkpoint, else the one
that the training configuration names (compression_model_checkpoint); one of the hub (//pretrained/…) is written as a
pointer to it. --compression takes a training folder, or a file.

  python -m archive_scripts export outputs/xps/97d170e1 my-finetune
  python -m archive_scripts export trained_model.tar my-finetune
  python -m archive_scripts export --base small lm_final.pt my-finetune
  python -m archive_scripts pack my-finetune
"""
VERSION = "1.4.0a2"
"""The version of audiocraft whose exports these are like."""

PRETRAINED = "//pretrained/"


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "export", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="a training folder, or a file")
    parser.add_argument("output", metavar="OUT", type=Path, help="the folder to write, made if need be")
    parser.add_argument(
        "--base", metavar="VARIANT", help="the model it was trained from: a name, hub id, folder or file"
    )
    parser.add_argument(
        "--compression", metavar="CODEC", type=Path, help="training folder, or file, of the codec it was trained with"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    export(args.checkpoint, args.output, args.compression, args.base)
    written = [f"{file} {size((args.output / file).stat().st_size)}" for file in (LM_FILE, COMPRESSION_FILE)]
    print(f"{args.output}: {', '.join(written)}")


def export(checkpoint: Path, output: Path, compression: Path | None = None, base: str | None = None) -> None:
    """Write the exported files of a fine-tune; the arguments are the command's.

    Auxiliary models that lie in a `hub` folder beside the checkpoint or in the base's come along.

    Raises:
        CheckpointError: a checkpoint cannot be read, is of another kind of model or does not fit its configuration,
            holds numbers that are not finite, or its codec is nowhere.
        CommandError: the disk is too small.
    """
    base_folder = None if base is None else resolve(base)
    base_model = None if base_folder is None else read_training(base_folder / LM_FILE)
    language_model = read_training(checkpoint, base_model)
    if not language_model.config.get("transformer_lm"):
        raise CheckpointError(
            f"{language_model.source} is no language model: its xp.cfg has no transformer_lm. A codec is given with "
            f"its language model: `python -m archive_scripts export --compression {shlex.quote(str(checkpoint))} "
            "LANGUAGE_MODEL OUT`."
        )
    _check(language_model, base, base_model)
    beside = training_file(checkpoint).parent
    codec = _codec(language_model, compression, base_folder, beside)
    packages = {LM_FILE: _package(language_model), COMPRESSION_FILE: codec}
    output.mkdir(parents=True, exist_ok=True)
    require_space(output, sum(_tensor_bytes(package) for package in packages.values()))
    with workspace(output, "export") as made:
        for file, package in packages.items():
            torch.save(package, made / file)
        _bring_auxiliaries(made, output, [folder for folder in (beside, base_folder) if folder is not None])
        for file in packages:
            move_into_place(made / file, output / file)


def _check(language_model: Training, base: str | None, base_model: Training | None) -> None:
    """Raises CheckpointError unless the parameters are those that the configuration asks for."""
    source, state = language_model.source, language_model.state
    try:
        build_language_model(Checkpoint(source, language_model.config, state))
        if base_model is not None and base_model.text == language_model.text:
            _check_conditioners(source, state, base_model.state)
    except CheckpointError as error:
        if base is None:
            raise
        raise CheckpointError(
            f"{error} If it was trained from another model than {base}, name that one with --base."
        ) from error


def _check_conditioners(source: str, state: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    def shapes(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
        return {name: list(tensor.shape) for name, tensor in tensors.items() if name.startswith("condition_provider.")}

    theirs, ours = shapes(expected), shapes(state)
    for name in theirs.keys() | ours.keys():
        if theirs.get(name) != ours.get(name):
            if name not in ours:
                raise CheckpointError(f"{source} lacks {name!r}, which the base has: the file is incomplete.")
            raise CheckpointError(
                f"{source}: {name!r} has the shape {ours[name]}, and that of the base is "
                f"{theirs.get(name, 'none: it has no such parameter')}."
            )


def _package(training: Training) -> dict[str, Any]:
    state = {}
    for name, tensor in training.state.items():
        require_finite(tensor, name, training.source)
        state[name] = tensor.clone()  # or its whole storage would be saved with it
    return {"best_state": state, "xp.cfg": training.text, "version": VERSION, "exported": True}


def _codec(
    language_model: Training, compression: Path | None, base_folder: Path | None, beside: Path
) -> dict[str, Any]:
    base_file = None if base_folder is None else codec_file(base_folder)
    if compression is not None:
        return _codec_of(training_file(compression, COMPRESSION_FILE), base_file)
    for file in (base_file, beside / COMPRESSION_FILE):
        if file is not None and file.is_file():
            return _codec_of(file, base_file)
    named = language_model.config.get("compression_model_checkpoint")
    if isinstance(named, str) and named.startswith(PRETRAINED) and len(named) > len(PRETRAINED):
        return _pointer(named.removeprefix(PRETRAINED))
    raise CheckpointError(
        f"{language_model.source}: its codec is {named!r} (compression_model_checkpoint), which is none of the hub's. "
        "Give the folder that it was trained into, or its exported file, with --compression; or, if it is the codec of "
        "a published model, that model with --base."
    )


def _codec_of(file: Path, base_file: Path | None) -> dict[str, Any]:
    """The package of a codec's file: of an export as it is, of a pointer what it leads to on this machine."""
    try:
        found = read_checkpoint(file)
    except CheckpointError:
        base = None if base_file is None or base_file == file else _base_codec(base_file)
        training = read_training(file, base)
        if not training.config.get("compression_model"):
            raise CheckpointError(f"{training.source} is no codec: its xp.cfg has no compression_model.") from None
        return _package(training)
    if isinstance(found, Pointer):
        return _pointer(found.name) if found.local_file is None else _codec_of(found.local_file, base_file)
    if not found.config.get("compression_model"):
        raise CheckpointError(f"{found.source} is no codec: its xp.cfg has no compression_model.")
    package, _ = read_torch_file(file)
    return dict(package)


def _base_codec(file: Path) -> Training | None:
    return None if isinstance(read_checkpoint(file), Pointer) else read_training(file)


def _pointer(name: str) -> dict[str, Any]:
    return {"pretrained": name, "exported": True, "version": VERSION}


def _bring_auxiliaries(made: Path, output: Path, folders: Sequence[Path]) -> None:
    """Copies the auxiliary models that the exported files in `made` need and a `hub` of one of the folders holds."""
    for name in needed_auxiliaries(made):
        place = Path("hub") / auxiliary_folder_name(name)
        source = next((folder / place for folder in folders if (folder / place).is_dir()), None)
        if source is None or (output / place).exists():
            continue
        shutil.copytree(source, made / place)
        (output / "hub").mkdir(exist_ok=True)
        move_into_place(made / place, output / place)


def _tensor_bytes(package: dict[str, Any]) -> int:
    state: dict[str, Tensor] = package.get("best_state", {})
    return sum(tensor.nbytes for tensor in state.values())
