"""`token`: the tokens of a running server."""

from __future__ import annotations

import argparse
import json
from typing import Any, get_args

from archive_scripts.errors import CommandError
from archive_scripts.run_folder import Scope, find_server

HELP = "print a running server's token, or renew it"
DESCRIPTION = """\
Print the token that requests to the server that `serve` runs on this machine have to carry, as the header
`Authorization: Bearer TOKEN`. The server makes its tokens when it starts; they are good for 30 days
(token_expiration_min in config.properties). Who can make clips needs the one for inference; the one for management,
which these commands use, stays with the operator.

--renew makes a new one. The old one is refused from then on.

  curl -H "Authorization: Bearer $(python -m archive_scripts token)" -d 'prompt=80s pop' \\
    http://127.0.0.1:8080/predictions/small -o clip.wav
  python -m archive_scripts token management --renew
"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "token", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("scope", choices=get_args(Scope), nargs="?", default="inference", help="default: %(default)s")
    parser.add_argument("--renew", action="store_true", help="make a new one first")
    parser.add_argument("--port", type=int, help="which server, by its port of requests, where several run here")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    server = find_server(args.port)
    if server.is_open:
        raise CommandError(f"the server at {server.inference} asks for no tokens (serve --open)")
    token = server.token(args.scope, args.renew)
    print(json.dumps({args.scope: token}) if args.json else token)
