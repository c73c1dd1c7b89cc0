from __future__ import annotations

import json
from pathlib import Path

import pytest
import soundfile

from archive_scripts.__main__ import main
from handler.registry import VARIANTS

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
MODEL = [str(GOLDENS / "text_mono"), "80s pop", "--hub-dir", str(GOLDENS / "hub"), "--duration", "0.5"]


@pytest.mark.parametrize("suffix", ["wav", "flac", "mp3", "ogg"])
def test_a_clip_is_written_in_the_format_of_its_name(suffix: str, tmp_path: Path) -> None:
    clip = tmp_path / f"clip.{suffix}"
    assert main(["generate", *MODEL, "-o", str(clip)]) == 0
    info = soundfile.info(clip)
    assert info.channels == 1
    assert info.duration == pytest.approx(0.5, abs=0.1)


def test_the_same_seed_gives_the_same_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        assert main(["generate", *MODEL, "--seed", str(seed), "-o", str(tmp_path / f"{name}.wav")]) == 0
    first, second, other = ((tmp_path / f"{name}.wav").read_bytes() for name in "abc")
    assert first == second
    assert first != other
    assert "seed 7" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["-o", "clip.aiff"], "the name must end in .wav, .flac, .mp3, .ogg"),
        (["-o", "nowhere/clip.wav"], "there is no folder nowhere"),
        (["--seed", "-1"], "seed: "),
        (["--duration", "0"], "duration: "),
    ],
)
def test_a_mistake_is_one_line_on_stderr(
    arguments: list[str],
    says: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["generate", *MODEL, *arguments]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_the_list_names_every_variant(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["VARIANT", *VARIANTS, "debug"]


def test_the_list_as_json_holds_what_the_table_says(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list", "--json"]) == 0
    variants = {variant["name"]: variant for variant in json.loads(capsys.readouterr().out)}
    assert set(variants) == set(VARIANTS)
    assert variants["stereo-melody"]["channels"] == 2
    assert variants["stereo-melody"]["conditioners"] == ["description", "melody"]
    assert variants["large"]["dim"] == 2048
