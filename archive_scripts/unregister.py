"""`unregister`: a version less on a running server."""

from __future__ import annotations

import argparse
import time
from typing import Any

from archive_scripts.arguments import add_drain, add_server
from archive_scripts.errors import CommandError
from archive_scripts.management import Management
from archive_scripts.run_folder import find_server
from archive_scripts.status import show_versions
from archive_scripts.workload import SETTLE_SECONDS, Workload, drain
from handler.drain import version_file

HELP = "drain a version and take it off a running server"
DESCRIPTION = """\
Take a version of a variant off the server that `serve` runs on this machine. First it finishes what it has accepted,
and what still reaches it is answered with a 503; then its workers end and its memory is free. The archive stays where
it is.

A request that reaches a worker in the very moment in which it ends is not answered at all, not even with an error:
TorchServe forgets it. Under load, have clients go elsewhere first: to another version by `set-default` (which this
command waits for), or to another server.

The version that requests go to can only be taken off as the variant's last one; before that, make another the default.

  python -m archive_scripts unregister jingles 1.0
  python -m archive_scripts unregister jingles --drain 300
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "unregister", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", metavar="VARIANT", help="its name on the server")
    parser.add_argument("version", metavar="VERSION", nargs="?", help="may be left out where there is only one")
    add_drain(parser)
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    server = find_server(args.port)
    management = Management(server)
    versions = management.versions(args.variant)
    if len(versions) > 1 and args.version is None:
        there = ", ".join(known.version for known in versions)
        raise CommandError(f"{args.variant} has the versions {there}; say which one to take off")
    version = management.version(args.variant, args.version)
    if version.is_default and len(versions) > 1:
        raise CommandError(
            f"requests for {version.variant} go to version {version.version}; make another the default first: "
            f"set-default {version.variant} VERSION"
        )

    def in_flight() -> int:
        return Workload(server).in_flight([management.version(version.variant, version.version)])

    # What was on its way to this version when another became the default is not refused.
    time.sleep(SETTLE_SECONDS)
    with server.draining(version_file(version.variant, version.version)):
        drain(in_flight, args.drain, args.force)
        management.unregister(version.variant, version.version)
    server.unlink(version.archive)
    show_versions(management.all_versions(), args.json)
