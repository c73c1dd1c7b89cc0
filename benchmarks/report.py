"""Tables of results, and the file that keeps them."""

from __future__ import annotations

import datetime
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

NONE = "-"
"""Stands in a cell where there is nothing to say."""

RESULTS = Path(__file__).resolve().parent / "RESULTS.md"

_HEAD = """# Results

Made by `python -m benchmarks all`, which replaces the section of its dimensions and device and leaves the others.
Weights are random, of the published models' true dimensions, and the same on both sides. Sides are measured in turns
in the same run. A figure with two others in brackets is a median with its quartiles. A limit follows from what this
machine was measured to do in the same run.
"""


@dataclass(frozen=True, slots=True)
class Table:
    """The result of one benchmark.

    Attributes:
        title: what was measured.
        columns: with their units.
        rows: a cell for each column.
        notes: how it was measured, and with what limits of this machine.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"a row of {self.title!r} has {len(row)} cells for {len(self.columns)} columns")

    def markdown(self) -> str:
        """A heading, the table and its notes."""
        lines = [f"### {self.title}", "", _line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        lines += ["", *(f"- {note}" for note in self.notes)] if self.notes else []
        return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def write(path: Path, section: str, machine: Mapping[str, str], tables: Sequence[Table]) -> None:
    """Writes tables as the section of that name, in place of the one there may be."""
    sections = _sections(path.read_text(encoding="utf-8")) if path.is_file() else {}
    facts = "\n".join(f"- {name}: {value}" for name, value in {"date": _today(), **machine}.items())
    sections[section] = f"{facts}\n\n" + "\n".join(table.markdown() for table in tables)
    texts = [_HEAD, *(f"## {name}\n\n{text.strip()}\n" for name, text in sorted(sections.items()))]
    path.write_text("\n".join(texts), encoding="utf-8")


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^## (.+)\n", text, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def _today() -> str:
    return datetime.datetime.now(datetime.UTC).date().isoformat()
