"""Typed reads from one section of a checkpoint's configuration."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from handler.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Section:
    """A section of a configuration, and what overrides it.

    Attributes:
        source: the file, for messages.
        layers: pairs of a dotted path and the values there; the first layer that has a key wins.

    Every read raises a CheckpointError that names the file, the key with its path, and what it may be.
    """

    source: str
    layers: tuple[tuple[str, Mapping[str, Any]], ...]

    def get(self, key: str, default: Any = None) -> Any:
        """The value as it stands."""
        return next((values[key] for _, values in self.layers if key in values), default)

    def integer(self, key: str, default: int, at_least: int = 1) -> int:
        value = self.get(key, default)
        if not isinstance(value, int) or value < at_least:
            raise self.error(key, f"must be an integer of at least {at_least}")
        return int(value)

    def integers(self, key: str, default: Sequence[int]) -> tuple[int, ...]:
        value = self.get(key, default)
        if not isinstance(value, Sequence) or not value or not all(isinstance(v, int) and v > 0 for v in value):
            raise self.error(key, "must be a list of positive integers")
        return tuple(value)

    def number(self, key: str, default: float, low: float, high: float) -> float:
        value = self.get(key, default)
        if not isinstance(value, int | float) or not low <= value <= high:
            raise self.error(key, f"must be a number from {low:g} to {high:g}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, "must be true or false")
        return value

    def choice(self, key: str, default: str, choices: Collection[str]) -> str:
        value = self.get(key, default)
        if not isinstance(value, str) or value not in choices:
            raise self.error(key, f"must be one of {', '.join(sorted(choices))}")
        return value

    def table(self, key: str) -> Mapping[str, Any]:
        """A mapping; absent and null are empty."""
        value = self.get(key)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise self.error(key, "must be a mapping")
        return value

    def part(self, key: str, *overrides: str) -> Section:
        """The section below `key`, overridden by the sections of it that `overrides` name."""
        base = Section(self.source, ((self._path(key), self.table(key)),))
        layers = [(base._path(name), base.table(name)) for name in overrides]
        return Section(self.source, (*layers, *base.layers))

    def log_unknown(self, known: Collection[str]) -> None:
        """Logs the keys that are not `known`: published configurations are full of older spellings."""
        unknown = sorted({key for _, values in self.layers for key in values} - set(known))
        if unknown:
            path = self.layers[-1][0]
            logger.info("%s: keys of %s without a known meaning are ignored: %s", self.source, path, ", ".join(unknown))

    def error(self, key: str, bound: str) -> CheckpointError:
        """The error that `key` doesn't keep to `bound`."""
        value = self.get(key, "absent")
        value = dict(value) if isinstance(value, Mapping) else value
        return CheckpointError(
            f"{self.source}: {self._path(key)} is {value!r}, and {bound}; no model can be built of it"
        )

    def _path(self, key: str) -> str:
        path = next((path for path, values in self.layers if key in values), self.layers[-1][0])
        return f"{path}.{key}" if path else key
