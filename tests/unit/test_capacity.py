"""The capacity model: against the engine it is a model of, and against queues played through."""

from __future__ import annotations

import heapq
import json
import math
import random
import re
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from archive_scripts import capacity
from archive_scripts.capacity import Goal, Gpu, Load, late_share, plan_for, steps_of_clip
from archive_scripts.errors import CommandError
from handler.engine.messages import Job
from handler.musicgen import MusicGen
from handler.params import Clip, GenerationParams
from handler.registry import VARIANTS
from tests.parity.models import load
from tests.unit.test_scheduler import Stage

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "deploy" / "CAPACITY.md"
RESULTS = ROOT / "benchmarks" / "RESULTS.md"
SMALL = VARIANTS["small"]
MILLION_A_DAY = 1_000_000 / (24 * 60)
GOAL = Goal(utilisation=0.7, wait=1.0, late=0.01, spare=1)


@pytest.fixture(scope="module")
def model() -> MusicGen:
    return load("text_mono")


class StopError(Exception):
    pass


@pytest.mark.parametrize("duration", [0.1, 8, 29.99, 30, 30.02, 48, 48.02, 120])
def test_the_steps_of_a_clip_are_those_that_the_model_takes(model: MusicGen, duration: float) -> None:
    def stop(done: int, total: int) -> None:
        raise StopError(total)

    with pytest.raises(StopError) as stopped, torch.inference_mode():
        model.generate_clip(Clip("jazz"), GenerationParams(duration=duration, seed=1), stop)
    assert stopped.value.args == (steps_of_clip(SMALL, duration),)


def test_a_full_engine_takes_the_steps_that_the_model_says(model: MusicGen) -> None:
    places, clips, duration = 4, 12, 1.0
    stage = Stage(model, requests=places, rows=2 * places)
    names = [str(number) for number in range(clips)]
    stage.submit(*(Job(name, Clip("jazz"), GenerationParams(duration=duration, seed=1)) for name in names))
    rounds = 0
    while len(stage.events) < clips or stage.scheduler.busy:
        stage.rounds(1)
        rounds += 1
    # A GPU that runs a hundred steps a second, with that many rows:
    plan = plan_for(SMALL, Load(60, duration), Gpu(2 * places, 100.0), GOAL)
    assert plan.places == places
    assert rounds / 100.0 == pytest.approx(clips / plan.clips_per_second, rel=0.05)


def test_the_time_of_clips_is_that_of_the_recorded_benchmark() -> None:
    section = RESULTS.read_text(encoding="utf-8").partition("## small, cpu\n")[2].partition("\n## ")[0]
    [line] = [line for line in section.splitlines() if line.startswith("| ours | float32 | 8 |")]
    steps_per_second = float(line.split("|")[6])
    together = r"\| 8 requests of 8 s, one after another .*\n\| the same together \| ([0-9.]+) s"
    measured, *_ = re.findall(together, section)  # with weights as they were published
    plan = plan_for(SMALL, Load(1, 8.0), Gpu(16, steps_per_second), GOAL)
    assert plan.places == 8
    assert plan.seconds == pytest.approx(float(measured), rel=0.2)  # without what comes before and after the steps


def played(places: int, offered: float, wait: float, seconds: Callable[[random.Random], float]) -> float:
    """The share of many requests that wait longer, when they come at random to so many places."""
    draw = random.Random(0)
    free = [0.0] * places
    now, late, count = 0.0, 0, 200_000
    for _ in range(count):
        now += draw.expovariate(offered)
        start = max(now, heapq.heappop(free))
        late += start - now > wait
        heapq.heappush(free, start + seconds(draw))
    return late / count


@pytest.mark.parametrize(("places", "offered", "wait"), [(1, 0.7, 1.0), (8, 6.0, 0.2), (8, 7.0, 0.0), (64, 60.0, 0.05)])
def test_the_share_that_waits_is_that_of_a_queue_played_through(places: int, offered: float, wait: float) -> None:
    share = late_share(places, offered, wait)
    assert share == pytest.approx(played(places, offered, wait, lambda draw: draw.expovariate(1.0)), rel=0.1, abs=0.003)
    # Clips of one length wait less: the model is on the safe side.
    assert played(places, offered, wait, lambda draw: 1.0) <= share


def test_as_many_gpus_as_the_load_needs_and_no_more() -> None:
    for requests_per_minute in (0.1, 5.0, 60.0, MILLION_A_DAY):
        for rows, speed in ((2, 50.0), (128, 235.0)):
            load, gpu = Load(requests_per_minute, 30), Gpu(rows, speed, 0.3)
            plan = plan_for(SMALL, load, gpu, GOAL)
            assert plan.utilisation <= GOAL.utilisation
            assert plan.late <= GOAL.late
            one_less = (plan.gpus - GOAL.spare - 1) * plan.places
            offered = plan.utilisation * (plan.gpus - GOAL.spare) * plan.places
            enough = one_less > 0 and offered / one_less <= GOAL.utilisation
            assert not (enough and late_share(one_less, offered, GOAL.wait / plan.seconds) <= GOAL.late)


def test_more_of_anything_needs_no_fewer_gpus() -> None:
    def gpus(rate: float = 600, duration: float = 30, speed: float = 100, overhead: float = 0.0, rows: int = 2) -> int:
        return plan_for(SMALL, Load(rate, duration, rows), Gpu(64, speed, overhead), GOAL).gpus

    assert gpus() < gpus(rate=6_000)
    assert gpus() < gpus(duration=120)
    assert gpus() < gpus(speed=50)
    assert gpus() < gpus(overhead=15.0)
    assert gpus() < gpus(rows=3)


def test_an_overloaded_server_makes_everybody_wait() -> None:
    assert late_share(4, 4.0, 1.0) == late_share(4, 9.0, 1.0) == 1.0
    assert late_share(4, 0.0, 0.0) == 0.0


def test_a_gpu_measured_with_too_few_rows_is_refused() -> None:
    with pytest.raises(CommandError, match="one request takes 2 rows"):
        plan_for(SMALL, Load(60, 30), Gpu(1, 100.0), GOAL)


def asked(*arguments: str) -> None:
    parser = ArgumentParser()
    capacity.add_parser(parser.add_subparsers())
    args = parser.parse_args(["capacity", *arguments])
    args.run(args)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("--requests-per-minute", "0"), ("--steps-per-second", "-1"), ("--utilisation", "1"), ("--late", "nan")],
)
def test_a_figure_that_makes_no_sense_is_refused(argument: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    good = ["--variant", "small", "--requests-per-minute", "60", "--duration", "8", "--steps-per-second", "9"]
    with pytest.raises(SystemExit):
        asked(*good, "--rows", "2", argument, value)
    assert argument in capsys.readouterr().err


def test_the_answer_comes_as_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--variant", "small", "--requests-per-minute", "60", "--duration", "8", "--steps-per-second", "50"]
    asked(*arguments, "--rows", "16", "--json")
    plan = json.loads(capsys.readouterr().out)
    assert (plan["steps"], plan["places"]) == (403, 8)
    assert math.isclose(plan["clips_per_second"], 8 * 50 / 403)


EXAMPLES = re.findall(
    r"^```text\n\$ python -m archive_scripts capacity (.*?)\n((?!\s*--).*?)```", PAGE.read_text(), re.M | re.S
)


@pytest.mark.parametrize(("arguments", "answer"), EXAMPLES)
def test_the_page_s_examples_are_what_the_command_says(
    arguments: str, answer: str, capsys: pytest.CaptureFixture[str]
) -> None:
    asked(*arguments.replace("\\\n", " ").split())
    assert capsys.readouterr().out == answer


def test_the_page_has_examples() -> None:
    assert len(EXAMPLES) >= 2
