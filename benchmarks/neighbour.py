"""The decode step alone, and while another process keeps a core busy."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.checkpoints import checkpoint_of
from benchmarks.ours import Ours
from benchmarks.report import Table
from benchmarks.timing import in_turns
from handler.musicgen import MusicGen

TURN_STEPS = 10
COLUMNS = ("ms a step, alone", "ms a step, with a neighbour", "times as long", "the fair share")


def run(args: argparse.Namespace) -> list[Table]:
    """The benchmark, as the command line asks for it."""
    return measure(args.dims, checkpoint_of(args.dims), args.device, args.seconds)


@torch.inference_mode()
def measure(name: str, checkpoint: Path, device: str, seconds: float) -> list[Table]:
    """One request's steps in turns of a few, every second turn with a process that never sleeps.

    Args:
        name: of the dimensions, for the title.
        checkpoint: the folder.
        device: where to run.
        seconds: of music.
    """
    model = MusicGen.get_pretrained(checkpoint, device, None, checkpoint / "hub")
    ours = Ours(model, 1, seconds)
    turns = max(2, round(seconds * model.frame_rate / TURN_STEPS / 2))

    def turn() -> None:
        for _ in range(TURN_STEPS):
            ours.step()

    ours.begin()
    turn()  # the warm-up
    ours.begin()
    alone, beside = in_turns({"alone": turn, "neighbour": _beside(turn)}, turns, device, "decode steps").values()
    threads = torch.get_num_threads()
    # With as many threads as cores, a busy process is one more that wants a core.
    fair = max(1.0, (threads + 1) / machine.available_cores())
    cells = (
        f"{alone.scaled(1e3 / TURN_STEPS):.1f}",
        f"{beside.scaled(1e3 / TURN_STEPS):.1f}",
        f"{beside.median / alone.median:.2f}",
        f"{fair:.2f}",
    )
    spin = os.environ.get("GOMP_SPINCOUNT", "OpenMP's own")
    notes = [f"{threads} threads; a thread that waits looks {spin} times for work before it sleeps (`GOMP_SPINCOUNT`)."]
    return [Table(f"The decode step with a busy neighbour, {name}, {device}", COLUMNS, [cells], notes)]


def _beside(turn: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
        try:
            turn()
        finally:
            busy.kill()
            busy.wait()

    return call
