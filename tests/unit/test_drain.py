from __future__ import annotations

import os
from pathlib import Path

import pytest

from handler.drain import FOLDER, SERVER, Drain, version_file, worker_file


@pytest.mark.parametrize(
    "name", [SERVER, version_file("small", "1.0"), worker_file(os.getpid())], ids=["server", "version", "worker"]
)
def test_a_worker_drains_while_it_is_asked_to(name: str, tmp_path: Path) -> None:
    drain = Drain(tmp_path, "small", "1.0")
    assert not drain.requested
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / name).touch()
    assert drain.requested
    (tmp_path / FOLDER / name).unlink()
    assert not drain.requested


@pytest.mark.parametrize("name", [version_file("small", "2.0"), version_file("large", "1.0"), worker_file(1)])
def test_what_others_are_asked_does_not_concern_it(name: str, tmp_path: Path) -> None:
    (tmp_path / FOLDER).mkdir()
    (tmp_path / FOLDER / name).touch()
    assert not Drain(tmp_path, "small", "1.0").requested
