"""The README's own commands, run as a reader would."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import soundfile

from archive_scripts.__main__ import build_parser
from archive_scripts.pack import pack
from archive_scripts.serve import curl_line
from handler.request import ALIASES, GenerationRequest
from handler.settings import Settings
from tests.e2e.conftest import Server, run_server

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Block:
    """A fenced block of the README; `dry` where a comment above it says that it is not run, and why."""

    language: str
    text: str
    dry: bool

    def __str__(self) -> str:
        return self.text.splitlines()[0]


FENCE = re.compile(r"(<!-- not run: [^\n]* -->\n)?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BLOCKS = [Block(language, text, bool(comment)) for comment, language, text in FENCE.findall(README)]
RUN = [block for block in BLOCKS if block.language in ("sh", "python") and not block.dry]
DRY = [block for block in BLOCKS if block.dry]


@pytest.fixture(scope="module")
def debug_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    yield from run_server([pack("debug", output=tmp_path_factory.mktemp("model-store"))])


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the commands need, so that what they write is not left in the project."""
    tree = tmp_path_factory.mktemp("tree")
    for package in ("handler", "archive_scripts"):
        shutil.copytree(ROOT / package, tree / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("config.properties", "metrics.yaml"):
        shutil.copy(ROOT / file, tree)
    return tree


def _run(command: list[str], tree: Path) -> str:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PATH": path}
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_the_commands_that_are_run_work_one_after_the_other(debug_server: Server, tree: Path) -> None:
    for block in RUN:
        text = block.text.replace("http://127.0.0.1:8080", debug_server.torchserve.url)
        text = text.replace("http://127.0.0.1:8082", debug_server.metrics)
        if block.language == "sh":
            _run(["bash", "-euc", text.replace("curl ", "curl --silent --show-error --fail ")], tree)
        else:
            _run([sys.executable, "-c", text], tree)
    for clip, seconds in (("clip.wav", 8), ("blues.wav", 4), ("pop.wav", 4), ("continued.wav", 6), ("pop.mp3", 4)):
        assert soundfile.info(tree / clip).duration == pytest.approx(seconds)
    assert (tree / "model-store" / "mine.mar").is_file()


@pytest.mark.parametrize("block", DRY, ids=str)
def test_the_commands_that_are_not_run_are_well_formed(block: Block) -> None:
    subprocess.run(["bash", "-nc", block.text], check=True)
    for line in block.text.splitlines():
        program, *arguments = shlex.split(line)
        if program == "make":
            subprocess.run(["make", "--dry-run", *arguments], cwd=ROOT, check=True, capture_output=True)
        else:
            assert [program, *arguments[:2]] == ["python", "-m", "archive_scripts"]
            assert build_parser().parse_args(arguments[2:]).command == arguments[2]


def test_every_command_of_ours_in_any_text_is_one_that_there_is() -> None:
    texts = [README, *(path.read_text(encoding="utf-8") for path in sorted((ROOT / "deploy").glob("*.md")))]
    commands = [
        shlex.split(line.partition("archive_scripts ")[2], comments=True)
        for text in texts
        for _, _, block in FENCE.findall(text)
        for line in block.splitlines()
        if line.strip().startswith("python -m archive_scripts ")
    ]
    assert len(commands) > 15
    for command in commands:
        build_parser().parse_args(command)


def test_the_curl_line_is_the_one_that_make_serve_prints() -> None:
    assert curl_line("http://127.0.0.1:8080", "debug", open_profile=True) in README.splitlines()


def _table(header: str) -> dict[str, list[str]]:
    """The rows of the table after a header line: the names in the first cell, and the other cells."""
    lines = README.split(header)[1].split("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {name: row[1:] for row in cells for name in re.findall(r"`(\w+)`", row[0])}


def test_the_table_of_fields_names_every_field_and_alias() -> None:
    rows = _table("| field | meaning | default |")
    assert set(rows) == set(GenerationRequest.model_fields) | set(ALIASES)
    for name, field in GenerationRequest.model_fields.items():
        default = rows[name][-1]
        if isinstance(field.default, int | float) and not isinstance(field.default, bool) and name != "stream":
            assert float(default) == field.default, name


def test_the_table_of_settings_names_every_setting_with_its_default() -> None:
    rows = _table("| key | meaning | default |")
    assert set(rows) == set(Settings.model_fields)
    for name, value in Settings().model_dump(exclude_none=True).items():
        assert json.loads(rows[name][-1]) == value, name
