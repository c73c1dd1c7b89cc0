"""htdemucs is read from each form it comes in, closed to anything else, and separates without chance."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from demucs.htdemucs import HTDemucs
from safetensors.torch import load_file, save_file

from handler.conditioners.htdemucs import (
    CONFIG_FILE,
    HUB_FILE,
    PICKLED_FILES,
    WEIGHTS_FILE,
    MelodySeparator,
    convert_htdemucs,
    load_htdemucs,
)
from handler.errors import CheckpointError
from tests.goldens.wavs import synth

PICKLED = Path(__file__).parents[1] / "goldens/hub/htdemucs"


@pytest.fixture(scope="module")
def package() -> dict[str, Any]:
    """What demucs pickles, of the tiny model of the recordings."""
    with torch.serialization.safe_globals([HTDemucs, Fraction]):
        return torch.load(PICKLED / PICKLED_FILES[0], weights_only=True)


@pytest.fixture
def converted(tmp_path: Path) -> Path:
    convert_htdemucs(PICKLED, tmp_path / "converted")
    return tmp_path / "converted"


def assert_same(model: HTDemucs, other: HTDemucs) -> None:
    assert (model.sources, model.segment, model.samplerate) == (other.sources, other.segment, other.samplerate)
    state = other.state_dict()
    assert model.state_dict().keys() == state.keys()
    for name, tensor in model.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, state[name])


def test_the_converted_form_is_the_same_model(converted: Path) -> None:
    assert_same(load_htdemucs(converted), load_htdemucs(PICKLED))


def test_the_hub_form_is_the_same_model(tmp_path: Path, package: dict[str, Any]) -> None:
    kwargs = package["kwargs"] | {"segment": {"_type": "fraction", "numerator": 39, "denominator": 5}}
    metadata = {"klass": "demucs.htdemucs.HTDemucs", "args": "[]", "kwargs": json.dumps(kwargs)}
    save_file(package["state"], tmp_path / HUB_FILE, metadata)
    assert_same(load_htdemucs(tmp_path), load_htdemucs(PICKLED))
    convert_htdemucs(tmp_path, tmp_path)
    assert_same(load_htdemucs(tmp_path), load_htdemucs(PICKLED))


def test_the_hub_form_names_its_class_and_no_other_is_built(tmp_path: Path, package: dict[str, Any]) -> None:
    save_file(package["state"], tmp_path / HUB_FILE, {"klass": "os.system", "args": '["true"]', "kwargs": "{}"})
    with pytest.raises(CheckpointError, match="not an unquantised htdemucs"):
        load_htdemucs(tmp_path)


def test_converting_twice_gives_the_same_bytes(converted: Path, tmp_path: Path) -> None:
    for source in (PICKLED, PICKLED / PICKLED_FILES[0], converted):
        convert_htdemucs(source, tmp_path / "again")
        for name in (WEIGHTS_FILE, CONFIG_FILE):
            assert (tmp_path / "again" / name).read_bytes() == (converted / name).read_bytes()


def test_the_converted_form_keeps_the_stored_type_and_exact_arguments(converted: Path) -> None:
    assert {tensor.dtype for tensor in load_file(converted / WEIGHTS_FILE).values()} == {torch.float16}
    assert json.loads((converted / CONFIG_FILE).read_text())["segment"] == "39/5"


def test_the_converted_form_comes_first(converted: Path) -> None:
    (converted / PICKLED_FILES[0]).write_bytes(b"never read")
    assert_same(load_htdemucs(converted), load_htdemucs(PICKLED))


def test_the_published_file_is_known_by_its_hash(tmp_path: Path) -> None:
    shutil.copy(PICKLED / PICKLED_FILES[0], tmp_path / PICKLED_FILES[1])
    with pytest.raises(CheckpointError, match=r"955717e8-8726e21a\.th is damaged: its sha256"):
        load_htdemucs(tmp_path)


def test_a_local_file_is_known_by_the_hash_in_its_name(tmp_path: Path) -> None:
    begin = hashlib.sha256((PICKLED / PICKLED_FILES[0]).read_bytes()).hexdigest()[:8]
    file = tmp_path / f"mine-{begin}.th"
    shutil.copy(PICKLED / PICKLED_FILES[0], file)
    convert_htdemucs(file, tmp_path)
    assert_same(load_htdemucs(tmp_path), load_htdemucs(PICKLED))


class Trap:
    """Runs a command when it is unpickled openly."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch {self.file}",)


def test_a_foreign_class_is_named_and_never_run(tmp_path: Path, package: dict[str, Any]) -> None:
    torch.save(package | {"training_args": Trap(tmp_path / "trapped")}, tmp_path / PICKLED_FILES[0])
    with pytest.raises(CheckpointError, match=r"holds \w+\.system, .*refused.*Get 955717e8-8726e21a\.th"):
        load_htdemucs(tmp_path)
    assert not (tmp_path / "trapped").exists()


def missing_parameter(package: dict[str, Any]) -> dict[str, Any]:
    state = dict(package["state"])
    del state["encoder.0.conv.weight"]
    return package | {"state": state}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (missing_parameter, r"not hold a whole htdemucs: .*encoder\.0\.conv\.weight"),
        (lambda p: p | {"state": {"__quantized": True}}, "holds no plain parameters"),
        (lambda p: p | {"klass": Fraction}, "is not an htdemucs"),
        (lambda p: p["state"], "is not an htdemucs"),
        (lambda p: p | {"kwargs": None}, "not a list and a mapping"),
        (lambda p: p | {"kwargs": p["kwargs"] | {"nfft": "many"}}, "not hold a whole htdemucs: TypeError"),
        (
            lambda p: p | {"kwargs": p["kwargs"] | {"sources": ["drums", "bass", "rest", "vocals"]}},
            "separates drums, bass, rest, vocals, and a melody needs vocals and other",
        ),
    ],
)
def test_another_model_is_refused(tmp_path: Path, package: dict[str, Any], change: Any, message: str) -> None:
    torch.save(change(package), tmp_path / PICKLED_FILES[0])
    with pytest.raises(CheckpointError, match=message):
        load_htdemucs(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        convert_htdemucs(tmp_path, tmp_path)
    assert not (tmp_path / WEIGHTS_FILE).exists()


def test_arguments_demucs_no_longer_has_are_ignored(tmp_path: Path, package: dict[str, Any]) -> None:
    torch.save(package | {"kwargs": package["kwargs"] | {"gone": 1}}, tmp_path / PICKLED_FILES[0])
    assert_same(load_htdemucs(tmp_path), load_htdemucs(PICKLED))


@pytest.mark.parametrize("name", [PICKLED_FILES[0], WEIGHTS_FILE, CONFIG_FILE])
@pytest.mark.parametrize("kept", [0, 1000])
def test_a_file_cut_short_is_named(tmp_path: Path, converted: Path, name: str, kept: int) -> None:
    shutil.copytree(PICKLED, tmp_path / "cut")
    if name != PICKLED_FILES[0]:
        shutil.copytree(converted, tmp_path / "cut", dirs_exist_ok=True)
    file = tmp_path / "cut" / name
    file.write_bytes(file.read_bytes()[:kept][:-10])
    with pytest.raises(CheckpointError, match=rf"(?s){name}.*cannot be read|cannot be read.*{name}|{name}\) cannot"):
        load_htdemucs(tmp_path / "cut")


def test_an_empty_folder_is_told_what_it_lacks(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"holds no htdemucs: none of htdemucs\.safetensors, htdemucs\.th"):
        load_htdemucs(tmp_path)
    with pytest.raises(CheckpointError, match="does not exist"):
        convert_htdemucs(tmp_path / "absent.th", tmp_path)


def test_loading_draws_no_random_number() -> None:
    before = torch.random.get_rng_state()
    load_htdemucs(PICKLED)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_separating_twice_gives_the_same_samples() -> None:
    separator = MelodySeparator(load_htdemucs(PICKLED))
    melody = synth(1)[0]
    random.seed(0)
    first = separator(melody, 32000)
    random.seed(1)
    assert torch.equal(separator(melody, 32000), first)
    assert len(first) == len(melody)


@pytest.mark.parametrize("samples", [2, 3, 1001, 32001])
def test_silence_stays_silence_of_any_length(samples: int) -> None:
    melody = MelodySeparator(load_htdemucs(PICKLED))(torch.zeros(samples), 32000)
    assert samples - 1 <= len(melody) <= samples
    assert not melody.any()
