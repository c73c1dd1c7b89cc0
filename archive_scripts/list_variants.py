"""`list`: the published variants."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, astuple
from typing import Any

from archive_scripts.sizes import sizes_of
from handler.registry import DEBUG, VARIANTS

HELP = "list the published variants, what steers them and how large they are"
DESCRIPTION = """\
List the published variants: their archive's size on the disk, the memory they take on a GPU and on a CPU with one
request, the channels and sample rate of what they make, what steers them, and the auxiliary models they need (`fetch`
and `pack` bring these too). Sizes are computed from the dimensions; PyTorch's own few hundred MB come on top.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser("list", help=HELP, description=DESCRIPTION)
    parser.add_argument("--json", action="store_true", help="print a JSON list instead of a table")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.json:
        described = [asdict(variant) | {"bytes": asdict(sizes_of(variant))} for variant in VARIANTS.values()]
        print(json.dumps(described, indent=2))
        return
    rows: list[tuple[str, ...]] = [
        ("VARIANT", "SIZE", "DISK", "GPU", "CPU", "AUDIO", "STEERED BY", "NEEDS", "REPOSITORY")
    ]
    for variant in VARIANTS.values():
        audio = f"{'stereo' if variant.channels == 2 else 'mono'} {variant.sample_rate // 1000} kHz"
        sizes = [f"{count / 1e9:.1f} GB" for count in astuple(sizes_of(variant))]
        steered = ", ".join("text" if name == "description" else name for name in variant.conditioners)
        needs = ", ".join(variant.auxiliaries)
        rows.append((variant.name, variant.parameters, *sizes, audio, steered, needs, variant.repo))
    rows.append((DEBUG, "tiny", "", "", "", "mono 32 kHz", "text", "", "made here, random weights"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
