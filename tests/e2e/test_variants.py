"""Every published repository, in small: packed, verified, and served with the network cut."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile

from archive_scripts.pack import pack
from archive_scripts.verify import verify
from handler.registry import VARIANTS
from tests.variants import write_variant

ROOT = Path(__file__).resolve().parents[2]

# One server each, so that few workers are in memory at a time. The large ones are folders, as the README advises.
FOLDERS = ["large", "melody-large", "stereo-large", "stereo-melody-large"]
GROUPS = [
    ["small", "medium", "melody", "style"],
    ["stereo-small", "stereo-medium", "stereo-melody", "audiogen-medium"],
    FOLDERS,
]

Asked = Callable[[list[str]], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="module")
def archives(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    checkpoints, store = tmp_path_factory.mktemp("checkpoints"), tmp_path_factory.mktemp("store")
    return {
        name: pack(
            str(write_variant(name, checkpoints / name)),
            name=name,
            output=store,
            archive_format="no-archive" if name in FOLDERS else "zip-store",
        )
        for name in VARIANTS
    }


@pytest.fixture(scope="module")
def asked(archives: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Serves a group, once: gives the folder with the replies, and what the asking process reports."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
    environment["HF_HOME"] = str(tmp_path_factory.mktemp("empty-cache"))
    done: dict[str, tuple[Path, dict[str, Any]]] = {}

    def ask(group: list[str]) -> tuple[Path, dict[str, Any]]:
        if group[0] not in done:
            folder = tmp_path_factory.mktemp("replies")
            command = [sys.executable, "-m", "tests.e2e.offline", sys.executable, "-m", "tests.e2e.ask_variants"]
            command += [str(folder), *(str(archives[name]) for name in group)]
            run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
            assert run.returncode == 0, run.stdout + run.stderr
            done[group[0]] = folder, json.loads((folder / "report.json").read_text())
        return done[group[0]]

    return ask


def test_every_variant_is_among_them(archives: dict[str, Path]) -> None:
    assert set(archives) == set(VARIANTS) == {name for group in GROUPS for name in group}


@pytest.mark.parametrize("name", VARIANTS)
def test_its_archive_is_whole_and_rebuilds(archives: dict[str, Path], name: str) -> None:
    checks = dict(verify(archives[name]))
    assert not any(checks.values()), checks
    assert len(checks) == 6


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[0])
@pytest.mark.faults
def test_nothing_can_be_reached_from_where_they_are_served(asked: Asked, group: list[str]) -> None:
    _, report = asked(group)
    assert report["elsewhere"] == "Network is unreachable" or report["offline_by"] == "closed proxies"


@pytest.mark.parametrize("name", VARIANTS)
def test_it_answers_a_request_that_uses_its_conditioner(asked: Asked, name: str) -> None:
    folder, report = asked(next(group for group in GROUPS if name in group))
    first, again, other = (folder / f"{name}-{reply}" for reply in ("first", "again", "other"))
    assert set(report["statuses"][name].values()) == {200}, first.read_bytes()[:1000]
    samples, rate = soundfile.read(first, always_2d=True)
    variant = VARIANTS[name]
    assert (rate, samples.shape) == (variant.sample_rate, (variant.sample_rate, variant.channels))
    assert np.abs(samples).max(axis=0).min() > 0.01
    if variant.channels == 2:
        assert not np.array_equal(samples[:, 0], samples[:, 1])
    assert first.read_bytes() == again.read_bytes() != other.read_bytes()
