"""How the engine serves: requests together against one after another, and how soon a stream is heard."""

from __future__ import annotations

import argparse
import asyncio
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import machine
from benchmarks.checkpoints import checkpoint_of
from benchmarks.decode import PEER_DTYPES
from benchmarks.peer import load, make_clip, peer_folder
from benchmarks.report import Table
from benchmarks.timing import Spread
from handler.engine.engine import Engine
from handler.engine.messages import Audio, Done, Failed, Job, Started
from handler.engine.spec import ModelSpec
from handler.params import Clip, GenerationParams

PROMPTS = ("80s pop with heavy drums", "slow blues", "techno with a flute", "calm piano")


@dataclass(frozen=True, slots=True)
class Times:
    """Of one request, in seconds since it was sent.

    Attributes:
        started: its conditions were ready and its rows free.
        heard: the first audio was there.
        done: all of it was.
    """

    started: float
    heard: float
    done: float


def run(args: argparse.Namespace) -> list[Table]:
    """The benchmark, as the command line asks for it."""
    how = (args.requests, args.duration, args.chunk, args.repeats, args.peer == "transformers")
    tables = []
    for dtype in args.dtype or (None,):
        tables += measure(args.dims, checkpoint_of(args.dims), args.device, dtype, *how)
    if args.dtype is None and machine.kind(args.device) == "cpu":
        checkpoint = checkpoint_of(args.dims, float32=True)
        tables += measure(f"{args.dims} with weights that float16 cannot hold", checkpoint, args.device, None, *how)
    return tables


def measure(
    name: str,
    checkpoint: Path,
    device: str,
    dtype: str | None,
    requests: int,
    duration: float,
    chunk: float,
    repeats: int,
    with_peer: bool,
) -> list[Table]:
    """Starts an engine and asks it for music.

    Args:
        name: of the dimensions, for the title.
        checkpoint: the folder.
        device, dtype: as `MusicGen.get_pretrained`.
        requests: how many together, and one after another.
        duration: seconds of each.
        chunk: seconds of one chunk of audio.
        repeats: of the requests to an idle engine.
        with_peer: whether to make one of the clips with the peer, in float32 on a CPU and in float16 on a GPU.
    """
    spec = ModelSpec(
        checkpoint=checkpoint,
        hub_dir=checkpoint / "hub",
        device=device,
        dtype=dtype,
        threads=None,
        max_concurrency=requests,
        memory_budget=None,
        max_prompt_tokens=64,
        chunk_seconds=chunk,
    )
    engine = Engine(spec, max_queue=requests, audio_budget=0)
    began = time.monotonic()
    engine.start()
    ready = time.monotonic() - began
    title = f"Serving, {name}, {device}, {engine.describe().dtype}"
    notes = [f"First audio is half a chunk; {repeats} requests of one chunk of {chunk:g} s to an idle engine."]
    try:
        rows, together = asyncio.run(_rows(engine, requests, duration, chunk, repeats))
    finally:
        engine.close()
    if with_peer:
        theirs = _peer_seconds(checkpoint, device, duration)
        rows += [
            ("transformers, one of these clips", f"{theirs:.1f} s"),
            (f"together, times as fast as transformers making {requests}", f"{requests * theirs / together:.1f}"),
        ]
        notes.append("transformers takes one request at a time, so its time is that of one clip, times their number.")
    return [Table(title, ("what", "figure"), [("engine ready after", f"{ready:.1f} s"), *rows], notes)]


@torch.inference_mode()
def _peer_seconds(checkpoint: Path, device: str, duration: float) -> float:
    """Of one clip, from its text to its audio on the host, after a short one."""
    folder = peer_folder(checkpoint)
    peer = load(folder, PEER_DTYPES[machine.kind(device)][0], device)
    make_clip(peer, folder, PROMPTS[0], min(0.2, duration))
    began = time.monotonic()
    make_clip(peer, folder, PROMPTS[0], duration).cpu()
    return time.monotonic() - began


async def _rows(
    engine: Engine, requests: int, duration: float, chunk: float, repeats: int
) -> tuple[list[tuple[str, str]], float]:
    """The lines of the table, and the seconds of all requests together."""
    await _request(engine, 0, min(1.0, duration))  # warm-up
    idle = [await _request(engine, i, chunk) for i in range(repeats)]
    heard = Spread([times.heard for times in idle])
    prefill = Spread([times.started for times in idle])
    whole = Spread([times.done - times.started for times in idle])
    began = time.monotonic()
    for i in range(requests):
        await _request(engine, i, duration)
    one_by_one = time.monotonic() - began
    began = time.monotonic()
    together = await asyncio.gather(*(_request(engine, i, duration) for i in range(requests)))
    all_together = time.monotonic() - began
    rows = [
        ("first audio of an idle engine", f"{heard:.2f} s"),
        ("its conditions", f"{prefill:.2f} s"),
        (f"one chunk of {chunk:g} s with its prefill", f"{whole:.2f} s"),
        ("first audio over conditions and chunk", f"{heard.median / (prefill.median + whole.median):.2f}"),
        (f"{requests} requests of {duration:g} s, one after another", f"{one_by_one:.1f} s"),
        ("the same together", f"{all_together:.1f} s"),
        ("together, times as fast", f"{one_by_one / all_together:.2f}"),
        ("seconds of audio a second", f"{requests * duration / all_together:.2f}"),
        ("the last of them first heard after", f"{max(times.heard for times in together):.1f} s"),
    ]
    return rows, all_together


async def _request(engine: Engine, index: int, duration: float) -> Times:
    params = GenerationParams(duration=duration, seed=index)
    began = time.monotonic()
    started = heard = done = 0.0
    async for event in engine.generate(Job(f"benchmark-{index}", Clip(PROMPTS[index % len(PROMPTS)]), params)):
        now = time.monotonic() - began
        match event:
            case Started():
                started = now
            case Audio():
                heard = heard or now
            case Done():
                done = now
            case Failed(error):
                raise error
    return Times(started, heard, done)
