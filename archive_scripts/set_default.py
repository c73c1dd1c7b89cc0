"""`set-default`: which version of a variant requests go to."""

from __future__ import annotations

import argparse
from typing import Any

from archive_scripts.arguments import add_server
from archive_scripts.errors import CommandError
from archive_scripts.management import Management
from archive_scripts.run_folder import find_server
from archive_scripts.status import show_versions

HELP = "send a variant's requests to another of its versions"
DESCRIPTION = """\
Make a version of a variant the one that requests go to if they name none, on the server that `serve` runs on this
machine. Requests that the other version has accepted are finished there. The version has to be there (`register`), with
a worker that is ready.

  python -m archive_scripts set-default jingles 2.0
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "set-default", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", metavar="VARIANT", help="its name on the server")
    parser.add_argument("version", metavar="VERSION", help="the version, such as 2.0")
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    management = Management(find_server(args.port))
    version = management.version(args.variant, args.version)
    if not version.ready:
        raise CommandError(
            f"{version.variant} {version.version} has no worker that is ready, so requests would fail; see `status`, "
            f"and start one: scale {version.variant} 1 --version {version.version}"
        )
    management.set_default(version.variant, version.version)
    show_versions(management.versions(version.variant), args.json)
