"""How the engine serves: requests together against one after another, and how soon a stream is heard."""

from __future__ import annotations

import argparse
import asyncio
import statistics
import time
from dataclasses import dataclass

from benchmarks.checkpoints import checkpoint_of
from handler.engine.engine import Engine
from handler.engine.messages import Audio, Done, Failed, Job, Started
from handler.engine.process import ModelSpec
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


def run(args: argparse.Namespace) -> None:
    """Prints the benchmark."""
    spec = ModelSpec(
        checkpoint=checkpoint_of(args.dims),
        hub_dir=checkpoint_of(args.dims) / "hub",
        device=args.device,
        dtype=args.dtype,
        threads=None,
        max_concurrency=args.requests,
        memory_budget=None,
        max_prompt_tokens=64,
        chunk_seconds=args.chunk,
    )
    engine = Engine(spec, max_queue=args.requests)
    began = time.monotonic()
    engine.start()
    print(f"{args.dims}, random weights, {engine.describe().dtype} on {engine.describe().device}")
    print(f"ready after {time.monotonic() - began:.1f} s")
    try:
        asyncio.run(_measure(engine, args))
    finally:
        engine.close()


async def _measure(engine: Engine, args: argparse.Namespace) -> None:
    await _request(engine, 0, min(1.0, args.duration))  # warm-up
    idle = [await _request(engine, i, args.chunk) for i in range(args.repeats)]
    heard = statistics.median(times.heard for times in idle)
    prefill = statistics.median(times.started for times in idle)
    chunk = statistics.median(times.done - times.started for times in idle)
    print(
        f"first audio of an idle engine: {heard:.2f} s (median of {len(idle)}); the conditions take {prefill:.2f} s, "
        f"and one chunk of {args.chunk:g} s with its prefill {chunk:.2f} s: {heard / (prefill + chunk):.2f} of both"
    )
    began = time.monotonic()
    for i in range(args.requests):
        await _request(engine, i, args.duration)
    one_by_one = time.monotonic() - began
    began = time.monotonic()
    together = await asyncio.gather(*(_request(engine, i, args.duration) for i in range(args.requests)))
    all_together = time.monotonic() - began
    audio = args.requests * args.duration
    print(f"{args.requests} requests of {args.duration:g} s, one after another: {one_by_one:.1f} s")
    print(
        f"the same together: {all_together:.1f} s, {one_by_one / all_together:.2f} times as fast, "
        f"{audio / all_together:.2f} s of audio a second; the last was heard after "
        f"{max(times.heard for times in together):.1f} s"
    )


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
