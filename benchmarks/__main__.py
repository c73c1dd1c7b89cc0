"""`python -m benchmarks COMMAND`."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import codec, decode, load, machine, neighbour, report, serve
from benchmarks.checkpoints import DIMS
from benchmarks.report import Table
from handler.cgroup import available_cores

BENCHMARKS: dict[str, tuple[Callable[[argparse.Namespace], list[Table]], str]] = {
    "decode": (decode.run, "the decode step, beside transformers and the memory bandwidth"),
    "neighbour": (neighbour.run, "the decode step alone, and while another process keeps a core busy"),
    "codec": (codec.run, "codes to audio, whole and in chunks, beside transformers' EncodecModel"),
    "load": (load.run, "from files to the first decode step, beside transformers' from_pretrained"),
    "serve": (serve.run, "requests together against one after another and beside transformers; first audio"),
}


def main(argv: Sequence[str] | None = None) -> None:
    args = _parser().parse_args(argv)
    tables = []
    torch.set_num_threads(min(torch.get_num_threads(), available_cores()))
    for benchmark in args.benchmarks:
        for table in BENCHMARKS[benchmark][0](args):
            print(table.markdown())
            tables.append(table)
    if args.output is not None:
        section = f"{args.dims}, {machine.kind(args.device)}"
        report.write(args.output, section, machine.describe(args.device), tables)
        print(f"written to {args.output}, section {section!r}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Measures this project on random checkpoints of true dimensions, beside transformers.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (_, text) in BENCHMARKS.items():
        command = commands.add_parser(name, help=text)
        command.set_defaults(benchmarks=[name], output=None)
        _add_options(command, [name])
    every = commands.add_parser("all", help="all of them; writes RESULTS.md")
    every.set_defaults(benchmarks=list(BENCHMARKS))
    every.add_argument(
        "--output", type=Path, default=report.RESULTS, help="the file whose section is written (default: %(default)s)"
    )
    _add_options(every, list(BENCHMARKS))
    return parser


def _add_options(command: argparse.ArgumentParser, benchmarks: Sequence[str]) -> None:
    """The options that these benchmarks read."""

    def option(name: str, readers: Sequence[str], text: str, **settings: Any) -> None:
        if any(benchmark in readers for benchmark in benchmarks):
            command.add_argument(f"--{name}", help=text, **settings)

    every = list(BENCHMARKS)
    option("dims", every, "of which model (default: %(default)s)", choices=DIMS, default="small")
    option("device", every, "cpu, cuda or cuda:N (default: %(default)s)", default="cpu")
    dtype = "float32, bfloat16, float16 or what else the language model takes (default: those of the device)"
    option("dtype", ["decode", "load", "serve"], dtype, nargs="+")
    peer = "what to measure beside it (default: %(default)s)"
    option("peer", ["decode", "codec", "load", "serve"], peer, choices=("transformers", "none"), default="transformers")
    rows = "in the decode step, two a request (default: 2 16)"
    option("rows", ["decode"], rows, type=int, nargs="+", default=[2, 16])
    option(
        "seconds", ["decode", "neighbour"], "of music in decode steps (default: %(default)s)", type=float, default=8.0
    )
    option("lengths", ["codec"], "seconds of clips (default: 10 30)", type=float, nargs="+", default=[10.0, 30.0])
    chunk = "seconds of one chunk of audio (default: %(default)s)"
    option("chunk", ["codec", "serve"], chunk, type=float, default=1.0)
    option("requests", ["serve"], "how many together (default: %(default)s)", type=int, default=8)
    option("duration", ["serve"], "seconds of each request (default: %(default)s)", type=float, default=8.0)
    repeats = "of clips, of loads, of requests to an idle engine (default: %(default)s)"
    option("repeats", ["codec", "load", "serve"], repeats, type=int, default=5)


if __name__ == "__main__":
    main()
