"""`pack`: build an archive."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from archive_scripts.archive import FORMATS, archive_path, build, check_names, collect, is_current
from archive_scripts.errors import CommandError
from archive_scripts.files import workspace
from archive_scripts.machine import size
from archive_scripts.members import open_archive
from handler.registry import DEBUG, find_variant, resolve
from handler.settings import SettingsError

MODEL_STORE = Path("model-store")
HELP = "build an archive from a checkpoint"
DESCRIPTION = """\
Build <name>.mar from a checkpoint: the published files byte for byte, the auxiliary models they name, this
project's code and a model-config.yaml. Everything a worker needs is inside: serving never touches the
network. Packing the same things again gives the same bytes.

  python -m archive_scripts pack small
  python -m archive_scripts pack large --format no-archive
  python -m archive_scripts pack ./my-finetune --name jingles --max-duration 60

--format no-archive makes a folder of the same contents. TorchServe unpacks a .mar each time it starts, and serves a
folder in place: better for large models.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "pack", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", metavar="VARIANT", help="a name, hub id or folder")
    parser.add_argument("--name", help="what the model is called on the server (default: the variant's name)")
    parser.add_argument("--output", type=Path, default=MODEL_STORE, help="folder to write to (default: %(default)s)")
    parser.add_argument("--version", default="1.0", help="the model's version (default: %(default)s)")
    parser.add_argument(
        "--format", choices=FORMATS, default=FORMATS[0], help="a .mar file or a folder (default: %(default)s)"
    )
    parser.add_argument(
        "--hub-dir", type=Path, help="folder of auxiliary models (t5-base, …), looked at before the hub"
    )
    parser.add_argument("--revision", help="branch, tag or commit of the hub repository (default: main)")
    parser.add_argument("--max-duration", type=float, help="longest clip a request may ask for, in seconds")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    settings = {} if args.max_duration is None else {"max_duration": args.max_duration}
    archive = pack(
        args.variant,
        name=args.name,
        output=args.output,
        version=args.version,
        hub_dir=args.hub_dir,
        revision=args.revision,
        handler=settings,
        archive_format=args.format,
    )
    with open_archive(archive) as packed:
        print(f"{archive}  {size(packed.total_bytes)}")


def pack(
    variant: str,
    name: str | None = None,
    output: Path = MODEL_STORE,
    version: str = "1.0",
    hub_dir: Path | None = None,
    revision: str | None = None,
    handler: Mapping[str, object] | None = None,
    archive_format: str = FORMATS[0],
) -> Path:
    """Build the archive of a variant and return its path; the arguments are the command's.

    Raises:
        CheckpointError: the checkpoint or an auxiliary model cannot be had or read.
        CommandError: the archive cannot be written as asked.
    """
    name = name or default_name(variant)
    check_names(name, version)
    checkpoint = resolve(variant, revision=revision)
    with workspace(output, name) as made:
        try:
            contents = collect(checkpoint, made, hub_dir, handler)
        except SettingsError as error:
            raise CommandError(str(error)) from error
        return build(contents, name, output, made, version, archive_format)


def pack_if_needed(variant: str, output: Path = MODEL_STORE) -> Path:
    """The variant's archive in `output`, built unless one with this tree's code is there, in either format."""
    folder = Path(variant).expanduser()
    local = None if _is_named(variant) or not folder.is_dir() else folder
    there = [path for form in FORMATS if (path := archive_path(output, default_name(variant), form)).exists()]
    for archive in there:
        if is_current(archive, local):
            return archive
    stale_folder = any(path.is_dir() for path in there)
    return pack(variant, output=output, archive_format=FORMATS[1] if stale_folder else FORMATS[0])


def default_name(variant: str) -> str:
    """The server's name for a variant: `small` for `facebook/musicgen-small`, else the last part of the id or
    path."""
    if variant.lower() == DEBUG:
        return DEBUG
    if known := find_variant(variant):
        return known.name
    last = Path(variant).expanduser().resolve()
    stem = last.parent.name if last.is_file() else last.name
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", stem).strip("-._") or "musicgen"


def _is_named(variant: str) -> bool:
    return variant.lower() == DEBUG or find_variant(variant) is not None
