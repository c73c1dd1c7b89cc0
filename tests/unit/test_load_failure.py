"""A worker leaves the cause for the commands on its server."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from handler.load_failure import FOLDER, failures, forget_failures, record_failure


@pytest.mark.parametrize("variant", ["small", "odd name/é@1", "../up", "a"])
def test_the_cause_is_found_by_version_and_process(tmp_path: Path, variant: str) -> None:
    (tmp_path / FOLDER).mkdir()
    record_failure(tmp_path, variant, "1.0", "no weights")
    assert failures(tmp_path, variant, "1.0") == {os.getpid(): "no weights"}
    assert failures(tmp_path, variant, "2.0") == failures(tmp_path, "other", "1.0") == {}
    assert [file.parent for file in tmp_path.rglob("*@*")] == [tmp_path / FOLDER]


def test_a_model_that_was_loaded_removes_the_causes_of_processes_that_have_ended(tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    record_failure(tmp_path, "small", "1.0", "no weights")
    for pid in (os.getppid(), 2**22 + 1):  # one is alive, the other can be nobody's
        (tmp_path / FOLDER / f"small@1.0@{pid}").write_text("memory is short")
    assert next(iter(failures(tmp_path, "small", "1.0").values())) == "no weights"
    forget_failures(tmp_path, "small", "1.0")
    assert failures(tmp_path, "small", "1.0") == {os.getppid(): "memory is short"}


def test_without_a_place_for_it_nothing_is_written(tmp_path: Path) -> None:
    record_failure(tmp_path, "small", "1.0", "no weights")
    assert not list(tmp_path.iterdir())
    assert failures(tmp_path, "small", "1.0") == {}
