"""`python -m archive_scripts COMMAND`: the operator's commands."""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from types import FrameType

from archive_scripts.errors import CommandError
from handler.errors import CheckpointError, RequestError

MODULES = {
    "list": "list_variants",
    "fetch": "fetch",
    "export": "export",
    "debug": "debug",
    "pack": "pack",
    "verify": "verify",
    "generate": "generate",
    "serve": "serve",
    "status": "status",
    "register": "register",
    "scale": "scale",
    "set-default": "set_default",
    "unregister": "unregister",
    "token": "tokens",
    "capacity": "capacity",
}
DESCRIPTION = """\
Build MusicGen archives for TorchServe, try them, and serve them: `serve` starts a server on this machine, and status,
register, scale, set-default, unregister, token and `list --served` work on it while it runs. Each command explains
itself: COMMAND --help.

A VARIANT is one of:
  a name          small, medium, melody, stereo-large, style … (see `list`), or musicgen-small and the like
  debug           a tiny model with random weights, made on the spot; it sounds like noise
  a hub id        owner/name of a repository with audiocraft's exported files
  a folder        holding state_dict.bin and compression_state_dict.bin (write ./small for a folder named as a
  variant)

Names and hub ids are downloaded once into the Hugging Face cache. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are
respected. For the commands on a running server VARIANT is its name there.

Exit codes: 0, 1 where `verify` finds fault, 2 for an error that the message says how to mend, 130 when interrupted.
"""


def build_parser(only: str | None = None) -> argparse.ArgumentParser:
    """The parser of all commands, or of one: importing PyTorch takes seconds, and not all of them need it."""
    parser = argparse.ArgumentParser(
        prog="python -m archive_scripts",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in [MODULES[only]] if only in MODULES else MODULES.values():
        importlib.import_module(f"archive_scripts.{module}").add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0, 1 where `verify` finds fault, 2 for an error a person can mend, 130 when interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    args = build_parser(argv[0] if argv else None).parse_args(argv)
    try:
        code = args.run(args)
    except (CommandError, CheckpointError, RequestError, OSError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code or 0


class _Ending:
    """SIGTERM, and SIGHUP of a terminal that is closed, end a command as Ctrl-C does: what is unfinished is cleared.

    They do so once, or a second one would cut the clearing short; only Ctrl-C again does.
    """

    def __init__(self) -> None:
        self._begun = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        if not self._begun or number == signal.SIGINT:
            self._begun = True
            raise KeyboardInterrupt


def end_in_order() -> None:
    """Has the signals that end a process end a command."""
    handler = _Ending()
    for ending in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(ending) is not signal.SIG_IGN:  # as after nohup
            signal.signal(ending, handler)


if __name__ == "__main__":
    end_in_order()
    sys.exit(main())
