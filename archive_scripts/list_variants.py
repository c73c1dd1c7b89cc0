"""`list`: the published variants."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, astuple
from typing import Any

from archive_scripts.arguments import add_server
from archive_scripts.management import Management
from archive_scripts.run_folder import find_server
from archive_scripts.sizes import sizes_of
from archive_scripts.status import show_versions
from archive_scripts.table import print_table
from handler.registry import DEBUG, VARIANTS

HELP = "list the published variants, what steers them and how large they are"
DESCRIPTION = """\
List the published variants: their archive's size on the disk, the memory they take on a GPU and on a CPU with one
request, the channels and sample rate of what they make, what steers them, and the auxiliary models they need (`fetch`
and `pack` bring these too). Sizes are computed from the dimensions; PyTorch's own few hundred MB come on top.

--served lists what the server that `serve` runs on this machine has instead: each version of each variant. `status`
also tells how busy they are.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "list", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--served", action="store_true", help="what a running server has")
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.served:
        show_versions(Management(find_server(args.port)).all_versions(), args.json)
        return
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
    print_table(rows)
