"""`status`: what a running server serves and how busy it is."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from archive_scripts.arguments import add_server
from archive_scripts.management import Management, Version
from archive_scripts.run_folder import find_server
from archive_scripts.table import print_table
from archive_scripts.workload import WAITING, Workload

HELP = "show what a running server serves, and how busy it is"
DESCRIPTION = """\
Show the server that `serve` runs on this machine: each version of each variant, whether requests that name no version
go to it, how many of its workers are ready, how many requests it has in flight, and how many of these wait for a place.
A worker that is not ready is loading its model. If one could not load it, the cause follows the table; such a worker
answers every request with a 503 and the cause.

  python -m archive_scripts status
  python -m archive_scripts status --port 9000 --json
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "status", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    server = find_server(args.port)
    versions = Management(server).all_versions()
    workload = Workload(server)
    if args.json:
        described = []
        for version in versions:
            workers = [asdict(worker) | workload.of_worker(worker) for worker in version.workers]
            described.append(asdict(version) | {"workers": workers})
        where = {"inference": server.inference, "management": server.management, "metrics": server.metrics}
        print(json.dumps({**where, "folder": str(server.path), "versions": described}, indent=2))
        return
    print(f"{server.inference} (private folder: {server.path})")
    rows: list[tuple[str, ...]] = [(*HEADS, "IN FLIGHT", "WAITING")]
    for version in versions:
        busy = (workload.in_flight([version]), workload.of(WAITING, version.workers) + version.pending)
        rows.append((*_row(version), *(str(count) for count in busy)))
    print_table(rows)
    _print_failures(versions)


def show_versions(versions: Sequence[Version], as_json: bool) -> None:
    """Print versions and their workers, without how busy they are."""
    if as_json:
        print(json.dumps([asdict(version) for version in versions], indent=2))
    else:
        print_table([HEADS, *(_row(version) for version in versions)])
        _print_failures(versions)


HEADS = ("VARIANT", "VERSION", "DEFAULT", "READY", "ARCHIVE")


def _print_failures(versions: Sequence[Version]) -> None:
    for version in versions:
        if version.failure:
            failed = sum(worker.failure is not None for worker in version.workers)
            workers = f"{failed} of {len(version.workers)} workers" if version.workers else "its last worker"
            print(f"{version.variant} {version.version}: {workers} could not load the model: {version.failure}")


def _row(version: Version) -> tuple[str, ...]:
    default = "yes" if version.is_default else ""
    ready = f"{version.ready} of {len(version.workers)}"
    return (version.variant, version.version, default, ready, version.archive)
