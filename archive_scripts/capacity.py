"""`capacity`: how many GPUs a load needs."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from archive_scripts.errors import CommandError
from archive_scripts.sizes import FRAME_RATE, ROWS, cache_values, sizes_of
from handler.registry import VARIANTS, Variant

HELP = "tell how many GPUs a load needs"
DESCRIPTION = """\
Tell how many GPUs a load needs, from what one GPU was measured to do: how many decode steps a second it runs with how
many rows in use (`python -m benchmarks decode` measures that; a request takes 2 rows, without guidance 1, with double
guidance 3). Each GPU is taken for so many places, a request for the time of its steps at that speed, and requests for
coming at random. There are enough GPUs when the places are used to --utilisation at most and at most --late of the
requests wait longer than --wait seconds for one; --spare come on top, for those that are down or being replaced.

deploy/CAPACITY.md explains the model and what it leaves out.

  python -m archive_scripts capacity --variant small --requests-per-minute 695 --duration 30 \\
    --steps-per-second 235 --rows 128
"""
DELAYS = 3  # steps that a window takes beyond its frames, of the delays between codebooks
HUNDRED = 100
LEAST_SHOWN = 1e-5


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked for.

    Attributes:
        requests_per_minute: on average, at the busiest time.
        duration: seconds of each clip.
        rows: of each request: 2 with guidance.
    """

    requests_per_minute: float
    duration: float
    rows: int = ROWS


@dataclass(frozen=True, slots=True)
class Gpu:
    """What one was measured to do.

    Attributes:
        rows: in use.
        steps_per_second: decode steps, each of which serves all rows.
        overhead: seconds of a request before its first step and after its last: text encoder, codec, audio format.
    """

    rows: int
    steps_per_second: float
    overhead: float = 0.0


@dataclass(frozen=True, slots=True)
class Goal:
    """How well it is to be served.

    Attributes:
        utilisation: share of the places that may be in use on average.
        wait, late: at most this share of the requests waits longer than so many seconds.
        spare: GPUs beyond those that are needed.
    """

    utilisation: float
    wait: float
    late: float
    spare: int


@dataclass(frozen=True, slots=True)
class Plan:
    """The answer.

    Attributes:
        steps: decode steps of one clip.
        seconds: that one clip takes, beside as many others as there are places.
        places: requests that one GPU runs together.
        clips_per_second: that one GPU makes with all places in use.
        gpus: needed, the spare ones included.
        utilisation: share of the places in use, without the spare ones.
        late: share of the requests that wait longer than the goal allows, without the spare ones.
        gpu_bytes: memory of one GPU that the model and all its places take.
    """

    steps: int
    seconds: float
    places: int
    clips_per_second: float
    gpus: int
    utilisation: float
    late: float
    gpu_bytes: int


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "capacity", help=HELP, description=DESCRIPTION, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", choices=VARIANTS, required=True, help="a published variant")
    parser.add_argument("--requests-per-minute", type=_positive, required=True, help="on average, at the busiest time")
    parser.add_argument("--duration", type=_positive, required=True, help="seconds of each clip")
    parser.add_argument(
        "--steps-per-second", type=_positive, required=True, help="decode steps of one GPU with --rows in use, measured"
    )
    parser.add_argument("--rows", type=int, required=True, help="rows of one GPU with which that was measured")
    parser.add_argument(
        "--rows-per-request", type=int, choices=(1, 2, 3), default=ROWS, help="2 with guidance (default: %(default)s)"
    )
    parser.add_argument(
        "--overhead",
        type=float,
        default=0.0,
        help="seconds of a request before its first step and after its last, measured (default: %(default)s)",
    )
    parser.add_argument(
        "--utilisation", type=_share, default=0.7, help="share of the places in use, at most (default: %(default)s)"
    )
    parser.add_argument(
        "--wait", type=_positive, default=1.0, help="seconds to wait for a place (default: %(default)s)"
    )
    parser.add_argument(
        "--late", type=_share, default=0.01, help="share of requests that may wait longer (default: %(default)s)"
    )
    parser.add_argument("--spare", type=int, default=1, help="GPUs on top (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    variant = VARIANTS[args.variant]
    load = Load(args.requests_per_minute, args.duration, args.rows_per_request)
    gpu = Gpu(args.rows, args.steps_per_second, args.overhead)
    plan = plan_for(variant, load, gpu, Goal(args.utilisation, args.wait, args.late, args.spare))
    if args.json:
        print(json.dumps(asdict(plan)))
        return
    late = f"{HUNDRED * plan.late:.2g} %" if plan.late > LEAST_SHOWN else "hardly any"
    print(f"a clip      {plan.steps} decode steps, {plan.seconds:.2f} s beside others")
    print(f"a GPU       {plan.places} requests together, {plan.clips_per_second:.2f} clips a second")
    print(f"its memory  {plan.gpu_bytes / 1e9:.1f} GB for the model and these requests")
    print(f"in use      {HUNDRED * plan.utilisation:.0f} % of the places on average")
    print(f"late        {late} of the requests wait longer than {args.wait:g} s")
    print(f"GPUs        {plan.gpus}, of which spare: {args.spare}")


def plan_for(variant: Variant, load: Load, gpu: Gpu, goal: Goal) -> Plan:
    """The fewest GPUs that serve a load well enough.

    Raises:
        CommandError: the GPU was measured with fewer rows than one request takes.
    """
    places = gpu.rows // load.rows
    if places == 0:
        raise CommandError(f"--rows {gpu.rows}: one request takes {load.rows} rows; measure with more of them")
    steps = steps_of_clip(variant, load.duration)
    seconds = steps / gpu.steps_per_second + gpu.overhead
    offered = load.requests_per_minute / 60 * seconds  # places in use on average
    gpus = max(1, math.ceil(offered / (places * goal.utilisation)))
    while (late := late_share(gpus * places, offered, goal.wait / seconds)) > goal.late:
        gpus += 1
    return Plan(
        steps=steps,
        seconds=seconds,
        places=places,
        clips_per_second=places / seconds,
        gpus=gpus + goal.spare,
        utilisation=offered / (gpus * places),
        late=late,
        gpu_bytes=sizes_of(variant).gpu + 2 * cache_values(variant) * (places * load.rows - ROWS) // ROWS,
    )


def steps_of_clip(variant: Variant, duration: float) -> int:
    """Decode steps of a clip: one for each frame, and in each window those of the codebooks' delays.

    A clip longer than the model's own window is made in windows that overlap; what a window takes over from the one
    before costs it no steps.
    """
    window, stride = (10, 2) if variant.name.startswith("audiogen") else (30, 18)
    frames, window, stride = int(duration * FRAME_RATE), window * FRAME_RATE, stride * FRAME_RATE
    windows = 1 + math.ceil(max(0, frames - window) / stride)
    return frames + windows * DELAYS


def late_share(places: int, offered: float, wait: float) -> float:
    """The share of requests that wait longer than `wait` for a place, by Erlang's C formula.

    Args:
        places: of all GPUs.
        offered: places in use on average.
        wait: in service times.

    Returns:
        The share; 1 if more is offered than there are places. It is that for service times at random about their
        mean; clips of one length take the same time, and wait less.
    """
    if offered >= places:
        return 1.0
    blocked = 1.0  # Erlang's B formula, place by place
    for place in range(1, places + 1):
        blocked = offered * blocked / (place + offered * blocked)
    waiting = blocked / (1 - offered / places * (1 - blocked))
    return waiting * math.exp(-(places - offered) * wait)


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value
