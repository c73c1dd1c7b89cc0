"""Times, taken in turns so that whatever else the machine does falls on all sides alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tqdm import tqdm

from benchmarks.machine import synchronise


@dataclass(frozen=True, slots=True)
class Spread:
    """Of repeated measurements.

    Attributes:
        values: all of them, in order.
    """

    values: Sequence[float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.values)

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Half of the values lie between these."""
        if len(self.values) < 2:
            return self.values[0], self.values[0]
        first, _, third = statistics.quantiles(self.values, n=4, method="inclusive")
        return first, third

    def scaled(self, factor: float) -> Spread:
        """All values times a factor."""
        return Spread([value * factor for value in self.values])

    def over(self, other: Spread) -> Spread:
        """The ratios of measurements taken in the same turns."""
        return Spread([mine / its for mine, its in zip(self.values, other.values, strict=True)])

    def __format__(self, spec: str) -> str:
        """The median, and the quartiles in brackets."""
        low, high = self.quartiles
        return f"{self.median:{spec}} ({low:{spec}} to {high:{spec}})"


def seconds_of(call: Callable[[], object], device: str) -> float:
    """How long a call takes, the device's work included."""
    synchronise(device)
    began = time.perf_counter()
    call()
    synchronise(device)
    return time.perf_counter() - began


def in_turns(calls: Mapping[str, Callable[[], object]], turns: int, device: str, description: str) -> dict[str, Spread]:
    """The seconds of each call, all called once a turn, in an order that rotates."""
    names = list(calls)
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in tqdm(range(turns), desc=description, unit="turn"):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(seconds_of(calls[name], device))
    return {name: Spread(values) for name, values in times.items()}
