from __future__ import annotations

import json
import re
from dataclasses import astuple
from pathlib import Path

import pytest

from archive_scripts.__main__ import build_parser, main
from archive_scripts.sizes import AUXILIARIES, CODEC_BYTES, lm_parameters, sizes_of
from handler.registry import VARIANTS, Variant

README = (Path(__file__).resolve().parents[2] / "README.md").read_text(encoding="utf-8")
TABLE = README.partition("| variant | steered by |")[2].partition("\n\n")[0]


def test_the_parameters_of_small_are_counted_exactly() -> None:
    assert lm_parameters(VARIANTS["small"]) == 420_371_456


@pytest.mark.parametrize("variant", [v for v in VARIANTS.values() if v.checkpoint_bytes], ids=lambda v: v.name)
def test_the_computed_parameters_make_the_published_size(variant: Variant) -> None:
    assert variant.checkpoint_bytes is not None
    codec = 0 if "encodec_32khz" in variant.auxiliaries else CODEC_BYTES
    assert 2 * lm_parameters(variant) + codec == pytest.approx(variant.checkpoint_bytes, rel=0.006)


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=lambda v: v.name)
def test_the_readme_s_table_says_what_is_computed_and_how_to_pack_it(variant: Variant) -> None:
    [row] = re.findall(rf"^\| `{variant.name}` \|(.*)\|$", TABLE, re.MULTILINE)
    steered, *sizes, command = [cell.strip() for cell in row.split("|")]
    assert steered.split(", ") == ["text" if name == "description" else name for name in variant.conditioners]
    assert sizes == [f"{count / 1e9:.1f} GB" for count in astuple(sizes_of(variant))]
    arguments = build_parser().parse_args(command.strip("`").split())
    assert (arguments.command, arguments.variant) == ("pack", variant.name)


def test_every_auxiliary_model_has_a_size() -> None:
    assert {name for variant in VARIANTS.values() for name in variant.auxiliaries} == set(AUXILIARIES)


def test_list_shows_every_variant_with_its_sizes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(VARIANTS) + 1
    assert re.match(r"stereo-large +3\.3B +7\.7 GB +8\.4 GB +9\.7 GB +stereo 32 kHz +text ", lines[8])
    assert main(["list", "--json"]) == 0
    [small, *_] = json.loads(capsys.readouterr().out)
    assert small["bytes"]["disk"] == sizes_of(VARIANTS["small"]).disk
