"""`debug`: write the debug checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

HELP = "write a tiny checkpoint with random weights, for trials and tests"
DESCRIPTION = """\
Write a tiny MusicGen with random weights into DIR, in the published checkpoint format: state_dict.bin,
compression_state_dict.bin and hub/t5-base with a working tokenizer. Nothing is downloaded, it takes a second,
and the files are the same every time. What it generates sounds like noise.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("debug", help=HELP, description=DESCRIPTION)
    parser.add_argument("folder", metavar="DIR", type=Path, help="the folder to write, made if need be")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from handler.debug_model import write_debug_checkpoint

    folder = write_debug_checkpoint(args.folder)
    print(f"wrote a debug checkpoint to {folder}")
