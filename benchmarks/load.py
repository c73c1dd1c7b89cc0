"""Loading: from files to the first decode step, in a process of its own, beside transformers' `from_pretrained`."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from benchmarks import machine
from benchmarks.checkpoints import checkpoint_of
from benchmarks.peer import peer_folder
from benchmarks.ready import Loaded, memory_of
from benchmarks.report import NONE, Table
from benchmarks.timing import Spread

DTYPES = {"cpu": ("float32",), "cuda": ("float16",)}
"""Of both sides, by kind of device."""

SAMPLE_SECONDS = 0.005

COLUMNS = (
    "side",
    "dtype",
    "import, s",
    "load, s",
    "first step, s",
    "both, s",
    "whole process, s",
    "times the peer",
    "peak memory, MB",
    "of it anonymous, MB",
    "weights, MB",
    "peak over weights",
    "files, MB",
    "limit, s",
    "share of the limit",
)


@dataclass(frozen=True, slots=True)
class Process:
    """What is seen from outside: its whole time, and the most anonymous memory seen."""

    loaded: Loaded
    seconds: float
    anonymous_bytes: int


def run(args: argparse.Namespace) -> list[Table]:
    """The benchmark, as the command line asks for it."""
    dtypes = args.dtype or DTYPES[machine.kind(args.device)]
    peer = args.peer == "transformers"
    return measure(args.dims, checkpoint_of(args.dims), args.device, dtypes, args.repeats, peer)


def measure(
    name: str, checkpoint: Path, device: str, dtypes: Sequence[str], repeats: int, with_peer: bool
) -> list[Table]:
    """Loads in fresh processes, side after side, the files in the page cache.

    Args:
        name: of the dimensions, for the title.
        checkpoint: the folder.
        device: where to load.
        dtypes: of our language model; the peer takes the device's own.
        repeats: processes of each side.
        with_peer: whether to measure it.
    """
    peer_dtype = DTYPES[machine.kind(device)][0]
    sides = [("ours", dtype) for dtype in dtypes]
    theirs = checkpoint / "transformers"
    files = {"ours": [p for p in checkpoint.rglob("*") if p.is_file() and not p.is_relative_to(theirs)]}
    folders = {"ours": checkpoint}
    if with_peer:
        sides.append(("transformers", peer_dtype))
        folders["transformers"] = peer_folder(checkpoint)
        files["transformers"] = [path for path in folders["transformers"].iterdir() if path.is_file()]
    bandwidth = min(machine.file_bandwidth(paths) for paths in files.values())  # and now all are in the page cache
    runs: dict[tuple[str, str], list[Process]] = {side: [] for side in sides}
    for _ in tqdm(range(repeats), desc="loads", unit="turn"):
        for side, dtype in sides:
            runs[side, dtype].append(_watched(side, folders[side], device, dtype))
    peer = _ready(runs["transformers", peer_dtype]) if with_peer else None
    rows = []
    for (side, dtype), processes in runs.items():
        size = sum(path.stat().st_size for path in files[side])
        rows.append(_row(side, dtype, processes, peer, size, size / bandwidth))
    notes = [
        f"{repeats} fresh processes a side. Imports are those of torch, transformers and the side's own modules; "
        "loading ends when the first decode step of a text with guidance is done.",
        "Memory is the host's, what loading adds to the imports: the peak of resident memory with the pages of mapped "
        "files, which the system takes back when it needs them; and of it anonymous, seen every "
        f"{SAMPLE_SECONDS * 1e3:.0f} ms. Weights are all tensors of the model, T5 and codec included, in their dtypes.",
        f"Reading files that the page cache holds: {bandwidth / 1e9:.1f} GB/s in one thread; the limit is reading "
        "them once.",
    ]
    return [Table(f"Loading, {name}, {device}", COLUMNS, rows, notes)]


def _ready(processes: Sequence[Process]) -> Spread:
    return Spread([process.loaded.load_seconds + process.loaded.step_seconds for process in processes])


def _row(
    side: str, dtype: str, processes: Sequence[Process], peer: Spread | None, file_bytes: int, limit: float
) -> list[str]:
    loads = [process.loaded for process in processes]
    ready = _ready(processes)
    peak = Spread([loaded.peak_bytes - loaded.imported_bytes for loaded in loads]).median
    anonymous = Spread([p.anonymous_bytes - p.loaded.imported_anonymous_bytes for p in processes]).median
    weights = loads[0].weight_bytes
    return [
        side,
        dtype,
        f"{Spread([loaded.import_seconds for loaded in loads]).median:.2f}",
        f"{Spread([loaded.load_seconds for loaded in loads]).median:.2f}",
        f"{Spread([loaded.step_seconds for loaded in loads]).median:.2f}",
        f"{ready:.2f}",
        f"{Spread([process.seconds for process in processes]).median:.2f}",
        NONE if peer is None else f"{peer.over(ready):.2f}",
        f"{peak / 1e6:.0f}",
        f"{anonymous / 1e6:.0f}",
        f"{weights / 1e6:.0f}",
        f"{peak / weights:.2f} ({anonymous / weights:.2f} anonymous)",
        f"{file_bytes / 1e6:.0f}",
        f"{limit:.2f}",
        f"{limit / ready.median:.0%}",
    ]


def _watched(side: str, folder: Path, device: str, dtype: str) -> Process:
    """Runs one process to its end and watches its memory."""
    command = [sys.executable, "-m", "benchmarks.ready", side, str(folder), device, dtype]
    began = time.perf_counter()
    with subprocess.Popen(command, cwd=machine.ROOT, stdout=subprocess.PIPE, text=True) as process:
        anonymous = 0
        while process.poll() is None:
            anonymous = max(anonymous, memory_of(process.pid).get("RssAnon", 0))
            time.sleep(SAMPLE_SECONDS)
        seconds = time.perf_counter() - began
        output = process.stdout.read() if process.stdout else ""
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}; what it said stands above")
    return Process(Loaded(**json.loads(output.splitlines()[-1])), seconds, anonymous)
