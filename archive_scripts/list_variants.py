"""`list`: the published variants."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from typing import Any

from handler.registry import DEBUG, VARIANTS

HELP = "list the published variants, what steers them and how large they are"
DESCRIPTION = """\
List the published variants: what steers them besides text, the channels and sample rate of what they make,
the size of the download, and the auxiliary models they need (fetched by `pack` as well).
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("list", help=HELP, description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps([asdict(variant) for variant in VARIANTS.values()], indent=2))
        return
    rows = [("VARIANT", "SIZE", "DOWNLOAD", "AUDIO", "STEERED BY", "NEEDS", "REPOSITORY")]
    for variant in VARIANTS.values():
        audio = f"{'stereo' if variant.channels == 2 else 'mono'} {variant.sample_rate // 1000} kHz"
        size = f"{variant.checkpoint_bytes / 1e9:.1f} GB" if variant.checkpoint_bytes else "?"
        steered = ", ".join("text" if name == "description" else name for name in variant.conditioners)
        needs = ", ".join(variant.auxiliaries)
        rows.append((variant.name, variant.parameters, size, audio, steered, needs, variant.repo))
    rows.append((DEBUG, "tiny", "none", "mono 32 kHz", "text", "", "made here, random weights"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
