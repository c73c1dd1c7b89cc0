"""`python -m benchmarks COMMAND`."""

from __future__ import annotations

import argparse

from benchmarks import serve
from benchmarks.checkpoints import DIMS


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description="Measures the engine on random checkpoints of true dimensions."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("serve", help="requests together against one after another; first audio")
    command.add_argument("--dims", choices=DIMS, default="small", help="of which model (default: %(default)s)")
    command.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N (default: %(default)s)")
    command.add_argument("--dtype", help="float32, bfloat16 or float16 (default: the device's own)")
    command.add_argument("--requests", type=int, default=8, help="how many together (default: %(default)s)")
    command.add_argument("--duration", type=float, default=8.0, help="seconds of each (default: %(default)s)")
    command.add_argument("--chunk", type=float, default=1.0, help="seconds of one chunk (default: %(default)s)")
    command.add_argument("--repeats", type=int, default=3, help="of the idle measurement (default: %(default)s)")
    command.set_defaults(run=serve.run)
    args = parser.parse_args()
    args.run(args)


if __name__ == "__main__":
    main()
