"""What the package sets for torch's libraries, before they are loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")
READ = "import handler, os; print([os.environ.get(name) for name in {names}])"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, ["10000", None]),
        ({"GOMP_SPINCOUNT": "5"}, ["5", None]),
        ({"OMP_WAIT_POLICY": "passive"}, [None, "passive"]),
    ],
)
def test_threads_soon_sleep_unless_the_operator_says_how_they_wait(
    given: dict[str, str], expected: list[str | None]
) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in NAMES} | given
    command = [sys.executable, "-c", READ.format(names=NAMES)]
    output = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, check=True).stdout
    assert output.strip() == str(expected)
