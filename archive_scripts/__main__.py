"""`python -m archive_scripts COMMAND`: the operator's commands."""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

from archive_scripts import debug, export, fetch, generate, list_variants, pack, serve, verify
from archive_scripts.errors import CommandError
from handler.errors import CheckpointError, RequestError

DESCRIPTION = """\
Build MusicGen archives for TorchServe, and serve or try them.

A VARIANT is one of:
  a name          small, medium, melody, stereo-large, style … (see `list`), or musicgen-small and the like
  debug           a tiny model with random weights, made on the spot; it sounds like noise
  a hub id        owner/name of a repository with audiocraft's exported files
  a folder        holding state_dict.bin and compression_state_dict.bin (write ./small for a folder named as a
  variant)

Names and hub ids are downloaded once into the Hugging Face cache. HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are
respected.
"""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m archive_scripts",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command", required=True)
    for module in (list_variants, fetch, export, debug, pack, verify, serve, generate):
        module.add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0, 1 where `verify` finds fault, 2 for an error a person can mend, 130 when interrupted.
    """
    args = build_parser().parse_args(argv)
    try:
        code = args.run(args)
    except (CommandError, CheckpointError, RequestError, OSError) as error:
        print(f"{args.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    return code or 0


if __name__ == "__main__":
    for ending in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(ending, signal.default_int_handler)  # as Ctrl-C: what is unfinished is cleared
    sys.exit(main())
