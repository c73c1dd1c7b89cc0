"""Arguments that several commands have."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

MODEL_STORE = Path("model-store")
STARTUP_SECONDS = 1200.0
DRAIN_SECONDS = 60.0
DTYPES = ("float32", "bfloat16", "float16", "int8")


def add_server(parser: argparse.ArgumentParser) -> None:
    """Which running server, and how its answer is printed."""
    parser.add_argument("--port", type=int, help="which server, by its port of requests, where several run here")
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_startup_timeout(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--startup-timeout",
        metavar="SECONDS",
        type=float,
        default=STARTUP_SECONDS,
        help="how long a model may take to load and make its first clip (default: %(default)g)",
    )


def add_drain(parser: argparse.ArgumentParser) -> None:
    """For commands that end workers of a running server."""
    parser.add_argument(
        "--drain",
        metavar="SECONDS",
        type=float,
        default=DRAIN_SECONDS,
        help="how long to wait for accepted requests; if some are left then, nothing is changed (default: %(default)g)",
    )
    parser.add_argument("--force", action="store_true", help="go on even if some are left; their clients get no answer")


def device(name: str) -> str:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise argparse.ArgumentTypeError(f"{name}: must be cpu, cuda or cuda:N")
    return name


def workers(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text}: must be a number of workers, 1 to 1000")
    return int(text)
