"""requirements.lock: what requirements.txt installs, each file by its hash."""

from __future__ import annotations

import re
from importlib.metadata import requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.faults

ROOT = Path(__file__).resolve().parents[2]
EXEMPT = re.compile(r"torch|triton|(nvidia|cuda)-.*")


@pytest.fixture(scope="module")
def lock() -> dict[str, tuple[str, list[str]]]:
    """Each package's version and hashes, by its name."""
    text = re.sub(r"^#.*\n", "", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE)
    entry = r"^([a-z0-9-]+)==(\S+)(?: ; \w+ == \S+)?((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$"
    # Nothing is there but such entries: no address, no option, no package without hashes.
    assert not re.sub(entry, "", text, flags=re.MULTILINE).strip()
    entries = re.findall(entry, text, re.MULTILINE)
    return {name: (version, re.findall(r"sha256:(\w+)", hashes)) for name, version, hashes in entries}


@pytest.fixture(scope="module")
def required() -> dict[str, str]:
    """Each package's version in requirements.txt."""
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    pins = (line.split("==") for line in lines if line)
    return {canonicalize_name(name): version for name, version in pins}


def test_it_pins_what_requirements_txt_pins(lock: dict[str, tuple[str, list[str]]], required: dict[str, str]) -> None:
    exempt = {name for name in required if EXEMPT.fullmatch(name)}
    assert exempt == {"torch"}
    assert {name: lock[name][0] for name in required.keys() - exempt} == {
        name: version for name, version in required.items() if name not in exempt
    }


def test_it_pins_all_that_these_need(lock: dict[str, tuple[str, list[str]]], required: dict[str, str]) -> None:
    """By what the installed packages say of themselves: pip is told to look for nothing that is not in the lock."""
    seen: set[str] = set()
    missing: set[str] = set()
    todo = list(required)
    while todo:
        name = todo.pop()
        if name in seen or (EXEMPT.fullmatch(name) and name != "torch"):
            continue
        seen.add(name)
        if name not in lock and name != "torch":
            missing.add(name)
            continue
        for line in requires(name) or []:
            requirement = Requirement(line)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                todo.append(canonicalize_name(requirement.name))
                version = lock.get(canonicalize_name(requirement.name), ("", []))[0]
                assert not version or requirement.specifier.contains(version), f"{name} needs {line}"
    assert not missing


def test_every_file_is_known_by_its_hash_and_none_twice(lock: dict[str, tuple[str, list[str]]]) -> None:
    assert lock
    for name, (_, hashes) in lock.items():
        assert len(set(hashes)) == len(hashes) > 0, name
        assert not EXEMPT.fullmatch(name), name
