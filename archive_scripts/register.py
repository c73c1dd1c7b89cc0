"""`register`: one more archive on a running server."""

from __future__ import annotations

import argparse
from contextlib import suppress
from pathlib import Path
from typing import Any

from archive_scripts.arguments import MODEL_STORE, add_server, add_startup_timeout, workers
from archive_scripts.client import generate
from archive_scripts.errors import CommandError
from archive_scripts.loading import set_workers
from archive_scripts.management import Management
from archive_scripts.members import model_name
from archive_scripts.run_folder import archive_version, find_server
from archive_scripts.serve import CANARY, find_archive
from archive_scripts.status import show_versions

HELP = "add a variant, or a new version of one, to a running server"
DESCRIPTION = """\
Add a variant or an archive to the server that `serve` runs on this machine, while it serves. Packs what is not yet in
the model store, loads it, and has it make a clip, so that a model that cannot is not left on the server.

A variant's first version gets its requests at once. A further version does not: it answers at
/predictions/VARIANT/VERSION, until `set-default` sends it all requests that name no version. To upgrade without losing
a request:

  python -m archive_scripts pack ./my-finetune --name jingles --version 2.0 --output upgrade
  python -m archive_scripts register upgrade/jingles.mar
  python -m archive_scripts set-default jingles 2.0
  python -m archive_scripts unregister jingles 1.0

Both versions are in memory until the old one is unregistered. Keep a folder that is being served (`pack --format
no-archive`) as it is, and pack the new version to another.
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "register", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("variant", metavar="VARIANT", help="a name, hub id or folder, or an archive")
    parser.add_argument(
        "--workers", type=workers, help="its workers (default: as many as the version it will replace, else 1)"
    )
    parser.add_argument(
        "--model-store", type=Path, default=MODEL_STORE, help="folder of archives (default: %(default)s)"
    )
    add_startup_timeout(parser)
    add_server(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    server = find_server(args.port)
    management = Management(server)
    archive = find_archive(args.variant, args.model_store)
    variant, version = model_name(archive), archive_version(archive)
    served = [known for known in management.all_versions() if known.variant == variant]
    if version in {known.version for known in served}:
        raise CommandError(
            f"{variant} {version} is on this server already; pack another version of it (pack --version 2.0 --output "
            "FOLDER) and register that archive, or give this one more workers with `scale`"
        )
    count = args.workers or max((len(known.workers) for known in served if known.is_default), default=1)
    link = server.link(archive)
    registered = False
    try:
        management.register(variant, link)
        registered = True
        set_workers(server, management.version(variant, version), count, args.startup_timeout)
        generate(server, f"{variant}/{version}", CANARY, args.startup_timeout)
    except (CommandError, KeyboardInterrupt) as error:
        if registered:  # else it may be somebody else's, who was faster
            with suppress(CommandError):
                management.unregister(variant, version)
            server.unlink(link)
        if isinstance(error, KeyboardInterrupt):
            raise
        raise CommandError(f"{variant} {version} was not registered: {error}") from error
    show_versions(management.versions(variant), args.json)
