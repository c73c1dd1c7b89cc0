"""TorchServe's configuration files: `key=value` lines."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from archive_scripts.errors import CommandError


def read_properties(path: Path) -> dict[str, str]:
    """The lines of a file; comments and blank lines are left out.

    Raises:
        CommandError: the file is not there.
    """
    if not path.is_file():
        raise CommandError(f"{path}: no such file; it is TorchServe's configuration and belongs to this project")
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.split("=", 1) for line in lines if "=" in line and not line.startswith(("#", "!")))
    return {key.strip(): value.strip() for key, value in pairs}


def write_properties(path: Path, properties: Mapping[str, str]) -> None:
    path.write_text("".join(f"{key}={value}\n" for key, value in properties.items()), encoding="utf-8")
