"""`scale`: how many workers a variant has on a running server."""

from __future__ import annotations

import argparse
from typing import Any

from archive_scripts.arguments import add_drain, add_server, add_startup_timeout, workers
from archive_scripts.errors import CommandError
from archive_scripts.loading import set_workers
from archive_scripts.management import Management
from archive_scripts.run_folder import find_server
from archive_scripts.status import show_versions
from archive_scripts.workload import IN_FLIGHT, Workload, drain
from handler.drain import worker_file

HELP = "change how many workers a variant has on a running server"
DESCRIPTION = """\
Set how many workers, processes with the model in them, a variant has on the server that `serve` runs on this machine.
Requests are shared evenly among them. Each needs the model's memory once more (see `list`); TorchServe gives each the
next GPU in turn.

More workers: returns when they are ready; if one cannot load the model, none is kept. Fewer: those that go first
finish what they have accepted, and answer what still reaches them with a 503 to be tried again; nothing accepted is cut
within --drain. (A request that reaches a worker in the very moment in which it ends is not answered at all: TorchServe
forgets it. Under constant load, register a version with fewer workers instead; see `register`.)

Without GPUs the cores are shared out when the server starts: workers beyond those of `serve --workers` compete with the
others for them.

  python -m archive_scripts scale small 2
  python -m archive_scripts scale small 1 --drain 300
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "scale", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", metavar="VARIANT", help="its name on the server")
    parser.add_argument("workers", metavar="N", type=workers, help="how many workers")
    parser.add_argument("--version", help="which version (default: the default one)")
    add_drain(parser)
    add_startup_timeout(parser)
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    server = find_server(args.port)
    management = Management(server)
    version = management.version(args.variant, args.version)
    leaving = version.workers[args.workers :]  # TorchServe ends the last ones first
    with server.draining(*(worker_file(worker.pid) for worker in leaving)):
        if leaving:
            drain(lambda: Workload(server).of(IN_FLIGHT, leaving), args.drain, args.force)
        try:
            version = set_workers(server, version, args.workers, args.startup_timeout)
        except CommandError:
            # A worker without a model would answer its share of the requests with errors.
            management.scale(version.variant, version.version, len(version.workers))
            raise
    show_versions([version], args.json)
