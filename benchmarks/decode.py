"""The decode step beside transformers' and beside what this machine's memory bandwidth allows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.checkpoints import checkpoint_of
from benchmarks.ours import Ours
from benchmarks.peer import PeerDecoder, load, peer_folder
from benchmarks.report import NONE, Table
from benchmarks.timing import Spread, in_turns
from handler.checkpoint import LM_FILE
from handler.lm.conditions import FusedConditions
from handler.musicgen import MusicGen
from handler.quantized import can_quantize

DTYPES = {"cpu": ("float32", "bfloat16", "int8"), "cuda": ("float16", "bfloat16")}
"""Of ours, by kind of device; any that `MusicGen.get_pretrained` takes can be asked for."""

PEER_DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("float16", "float32")}
"""Of the peer's; ratios are to the first, errors to float32's."""

ROWS_OF_A_REQUEST = 2  # with guidance
TURN_STEPS = 10
CHECKED_STEPS = 32

COLUMNS = (
    "side",
    "dtype",
    "requests",
    "ms a step, mean",
    "ms a step, by turns",
    "steps a second",
    "times real time",
    "times the peer",
    "error of logits",
    "MB read a step",
    "limit, ms",
    "share of the limit",
)


def served_dtypes(device: str) -> list[str]:
    """Those of `DTYPES` that this machine serves; int8 needs VNNI on a CPU."""
    return [dtype for dtype in DTYPES[machine.kind(device)] if dtype != "int8" or can_quantize()]


@dataclass(frozen=True, slots=True)
class Side:
    """One of those that take turns.

    Attributes:
        name, dtype, requests: of its line in the table.
        begin: starts over, with the first step of every request.
        step: one token of every codebook of every request.
        logits: of a whole sequence `[K, S]` under conditions, float32 `[R, S, K, card]`.
        step_bytes: what a step in the middle must read; None where nobody counts it.
    """

    name: str
    dtype: str
    requests: int
    begin: Callable[[], None]
    step: Callable[[], None]
    logits: Callable[[Tensor, FusedConditions], Tensor]
    step_bytes: Callable[[], float] | None

    def turn(self) -> None:
        """A few steps."""
        for _ in range(TURN_STEPS):
            self.step()


def run(args: argparse.Namespace) -> list[Table]:
    """The benchmark, as the command line asks for it."""
    dtypes = args.dtype or served_dtypes(args.device)
    peers = PEER_DTYPES[machine.kind(args.device)] if args.peer == "transformers" else ()
    requests = [max(1, rows // ROWS_OF_A_REQUEST) for rows in args.rows]
    return measure(args.dims, checkpoint_of(args.dims), args.device, dtypes, peers, requests, args.seconds)


@torch.inference_mode()
def measure(
    name: str,
    checkpoint: Path,
    device: str,
    dtypes: Sequence[str],
    peer_dtypes: Sequence[str],
    requests: Sequence[int],
    seconds: float,
) -> list[Table]:
    """Every side's steps of the first `seconds` of a clip, in turns of a few steps.

    Args:
        name: of the dimensions, for the title.
        checkpoint: the folder.
        device: where to run.
        dtypes: of ours, for each number of `requests`.
        peer_dtypes: of the peer, which runs one request; times are compared with the first.
        requests: how many run together, of ours.
        seconds: of music.
    """
    _check_memory(checkpoint, device, [*dtypes, *peer_dtypes])
    models = [MusicGen.get_pretrained(checkpoint, device, dtype, checkpoint / "hub") for dtype in dtypes]
    frame_rate = models[0].frame_rate
    conditions = Ours(models[0], 1, seconds).conditions()
    sides = [_peer(checkpoint, dtype, device, conditions) for dtype in peer_dtypes]
    sides += [
        _ours(Ours(model, n, seconds), dtype) for dtype, model in zip(dtypes, models, strict=True) for n in requests
    ]
    turns = max(1, round(seconds * frame_rate / TURN_STEPS))
    for side in sides:
        side.begin()
        side.turn()  # the warm-up
        side.begin()
    read, read_bytes = machine.memory_reader(device)
    read()
    calls: dict[str, Callable[[], object]] = {str(i): side.turn for i, side in enumerate(sides)}
    *times, reads = in_turns({**calls, "read": read}, turns, device, "decode steps").values()
    bandwidth = read_bytes / reads.median
    steps = [spread.scaled(1 / TURN_STEPS) for spread in times]
    errors = _errors(sides, conditions, models[0]) if peer_dtypes else [None] * len(sides)
    reference = steps[0] if peer_dtypes else None
    rows = [
        _row(side, step, frame_rate, reference, error, bandwidth)
        for side, step, error in zip(sides, steps, errors, strict=True)
    ]
    notes = [
        f"Steps 2 to {turns * TURN_STEPS + 1} of a clip, with guidance (two rows a request): forward pass, guidance, "
        f"top-k, draw. Each side in {turns} turns of {TURN_STEPS} steps; the mean is over all of them.",
        f"Reading memory: {bandwidth / 1e9:.1f} GB/s, the median of a reading in each turn. The limit is reading the "
        "weights once, as they are kept, and all cached keys and values of the step in the middle.",
        "Times the peer: the first line's mean time of as many requests, one after the other, over this line's.",
        "Error of logits: root mean square of the difference to the first line's in float32, over that of its logits, "
        f"on {CHECKED_STEPS} random tokens.",
    ]
    if machine.kind(device) == "cpu" and "float32" in dtypes:
        values = sum(weight.numel() for weight in Ours(models[dtypes.index("float32")], 1, seconds).step_weights())
        notes.append(
            "Of float32, ours keeps the weights in float16, which holds them exactly as they were published; reading "
            f"them as float32 would alone take {4 * values / bandwidth * 1e3:.1f} ms a step."
        )
    return [Table(f"Decode step, {name}, {device}", COLUMNS, rows, notes)]


def _peer(checkpoint: Path, dtype: str, device: str, conditions: FusedConditions) -> Side:
    peer = PeerDecoder(load(peer_folder(checkpoint), dtype, device))
    return Side("transformers", dtype, 1, lambda: peer.begin(conditions), peer.step, peer.logits, None)


def _ours(ours: Ours, dtype: str) -> Side:
    return Side("ours", dtype, ours.requests, ours.begin, ours.step, ours.logits, ours.step_bytes)


def _errors(sides: Sequence[Side], conditions: FusedConditions, model: MusicGen) -> list[float | None]:
    """The relative error of each side's logits against those of the first in float32, or of the first."""
    generator = torch.Generator().manual_seed(0)
    sequence = torch.randint(model.lm.card, (model.lm.num_codebooks, CHECKED_STEPS), generator=generator)  # [K, S]
    exact = next((side for side in sides if side.dtype == "float32"), sides[0])
    reference = exact.logits(sequence, conditions).float()  # [R, S, K, card]
    return [float((side.logits(sequence, conditions) - reference).norm() / reference.norm()) for side in sides]


def _row(
    side: Side, step: Spread, frame_rate: float, reference: Spread | None, error: float | None, bandwidth: float
) -> list[str]:
    rate = 1 / step.mean
    row = [
        side.name,
        side.dtype,
        str(side.requests),
        f"{step.mean * 1e3:.2f}",
        f"{step.scaled(1e3):.2f}",
        f"{rate:.1f}",
        f"{rate / frame_rate:.2f}",
        NONE if reference is None else f"{side.requests * reference.mean / step.mean:.2f}",
        NONE if error is None else f"{error:.1e}",
    ]
    if side.step_bytes is None:
        return [*row, NONE, NONE, NONE]
    limit = side.step_bytes() / bandwidth
    return [*row, f"{limit * bandwidth / 1e6:.0f}", f"{limit * 1e3:.2f}", f"{limit / step.mean:.0%}"]


def _check_memory(checkpoint: Path, device: str, dtypes: Sequence[str]) -> None:
    """All sides are loaded at once, or they could not take turns."""
    parameters = (checkpoint / LM_FILE).stat().st_size // 2  # float16
    needed = sum(parameters * (1 if dtype == "int8" else getattr(torch, dtype).itemsize) for dtype in dtypes)
    free = machine.free_memory(device)
    if needed > free:
        raise SystemExit(
            f"the language models of {', '.join(dtypes)} take {needed / 2**30:.1f} GiB together and {free / 2**30:.1f} "
            "GiB are free: ask for fewer with --dtype, for smaller --dims, or for --peer none"
        )
