from __future__ import annotations

import json
import math
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from archive_scripts.__main__ import main
from archive_scripts.archive import TORCHSERVE_SETTINGS
from archive_scripts.files import SUMS_FILE, parse_sums, read_sha256, sums_text
from archive_scripts.pack import pack
from archive_scripts.verify import verify

pytestmark = pytest.mark.faults

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
HUB = GOLDENS / "hub"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    store = tmp_path_factory.mktemp("store")
    source: dict[str, Any] = {"variant": str(GOLDENS / "stereo_hf"), "output": store, "hub_dir": HUB}
    return {form: pack(**source, archive_format=form) for form in ("zip-store", "no-archive")}


@pytest.fixture
def folder(packed: dict[str, Path], tmp_path: Path) -> Path:
    """A folder archive to spoil."""
    return Path(shutil.copytree(packed["no-archive"], tmp_path / "stereo"))


def _resum(folder: Path) -> None:
    """Checksums of what is there now: what a careful forger would do."""
    for place, left_out in ((folder / "checkpoint", "x"), (folder, "checkpoint")):
        sums_file = (place if left_out == "x" else place / "MAR-INF") / SUMS_FILE
        sums = {}
        for path in sorted(place.rglob("*")):
            relative = path.relative_to(place)
            if path.is_file() and path != sums_file and relative.parts[0] != left_out:
                with path.open("rb") as file:
                    sums[relative.as_posix()] = read_sha256(file)
        sums_file.write_text(sums_text(sums))


def _problems(path: Path, rebuild: bool = False) -> str:
    return "\n".join(problem for _, found in verify(path, rebuild) for problem in found)


@pytest.mark.parametrize("form", ["zip-store", "no-archive"])
def test_a_good_archive_passes_every_check_and_rebuilds(
    packed: dict[str, Path], form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(packed[form])]) == 0
    said = capsys.readouterr().out.splitlines()
    assert [line[:8].strip() for line in said[:-1]] == ["ok"] * 6
    assert said[-2].endswith("the model rebuilds: 32000 Hz, stereo, conditioned on description")
    assert said[-1] == f"{packed[form]}: good"


def test_a_served_folder_may_hold_what_python_caches(folder: Path) -> None:
    (folder / "handler" / "__pycache__").mkdir()
    (folder / "handler" / "__pycache__" / "audio.cpython-311.pyc").touch()
    assert not _problems(folder)


def _members(archive: Path) -> list[zipfile.ZipInfo]:
    with zipfile.ZipFile(archive) as held:
        return held.infolist()


def test_a_flipped_byte_of_any_file_is_found_and_the_file_named(packed: dict[str, Path], tmp_path: Path) -> None:
    data = packed["zip-store"].read_bytes()
    for info in _members(packed["zip-store"]):
        name_length, extra_length = struct.unpack_from("<HH", data, info.header_offset + 26)
        start = info.header_offset + 30 + name_length + extra_length
        spoiled = bytearray(data)
        spoiled[start + info.file_size // 2] ^= 0x10
        (tmp_path / "spoiled.mar").write_bytes(spoiled)
        assert info.filename in _problems(tmp_path / "spoiled.mar")


def test_a_flipped_byte_in_a_folder_is_found_and_the_file_named(folder: Path) -> None:
    for path in ("checkpoint/state_dict.bin", "handler/audio.py", "model-config.yaml", "MAR-INF/MANIFEST.json"):
        data = bytearray((folder / path).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / path).write_bytes(data)
        assert f"{path} is damaged" in _problems(folder)
        data[len(data) // 2] ^= 1
        (folder / path).write_bytes(data)
    assert not _problems(folder)


def test_a_fault_gives_the_exit_code_1_and_no_archive_2(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "checkpoint" / "state_dict.bin").write_bytes(b"cut")
    assert main(["verify", str(folder)]) == 1
    said = capsys.readouterr().out
    assert "FAILED  checksums\n        checkpoint/state_dict.bin is damaged" in said
    assert said.splitlines()[-1] == f"{folder}: 1 problem"
    (tmp_path / "cut.mar").write_bytes(b"PK")
    (tmp_path / "empty").mkdir()
    for path, says in (("cut.mar", "cut short"), ("empty", "no MAR-INF"), ("nowhere.mar", "no such archive")):
        assert main(["verify", str(tmp_path / path)]) == 2
        assert says in capsys.readouterr().err


def test_a_file_too_few_or_too_many_is_named(folder: Path) -> None:
    (folder / "handler" / "audio.py").rename(folder / "handler" / "more.py")
    found = _problems(folder)
    assert "handler/audio.py is missing" in found
    assert "handler/more.py has no checksum: it was not packed with the others" in found
    (folder / "checkpoint" / SUMS_FILE).unlink()
    assert "checkpoint/SHA256SUMS is missing" in _problems(folder)


def test_checksums_that_cannot_be_read_are_named(folder: Path) -> None:
    (folder / "MAR-INF" / SUMS_FILE).write_text("nonsense\n")
    assert "MAR-INF/SHA256SUMS is damaged: not a line of sha256sum" in _problems(folder)
    with pytest.raises(ValueError, match="not a line of sha256sum"):
        parse_sums("abc  short\n")


def test_a_link_in_a_folder_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (folder / "checkpoint" / "hub" / "more").symlink_to(tmp_path / "elsewhere")
    assert _problems(folder) == "checkpoint/hub/more is a link or another thing that is no file"


@pytest.mark.parametrize("name", ["../outside.py", "/outside.py", "handler/../../outside.py", "..\\outside.py"])
def test_a_path_that_leads_out_of_the_archive_is_refused_and_nothing_unpacked(
    name: str, packed: dict[str, Path], tmp_path: Path
) -> None:
    archive = Path(shutil.copy(packed["zip-store"], tmp_path / "bad.mar"))
    with zipfile.ZipFile(archive, "a") as held:
        held.writestr(name, "print('out')")
    assert "leads out of the archive" in _problems(archive)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.mar"]


def test_a_link_or_a_second_file_of_a_name_in_a_zip_is_refused(packed: dict[str, Path], tmp_path: Path) -> None:
    archive = Path(shutil.copy(packed["zip-store"], tmp_path / "bad.mar"))
    with zipfile.ZipFile(archive, "a") as held:
        link = zipfile.ZipInfo("handler/link.py")
        link.external_attr = 0o120777 << 16
        held.writestr(link, "/etc/passwd")
        with pytest.warns(UserWarning, match="Duplicate name"):
            held.writestr("handler/audio.py", "")
    found = _problems(archive)
    assert "handler/link.py is a link" in found
    assert "handler/audio.py is there twice" in found


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"batchSize": 8}, "batchSize is 8; with asyncCommunication it must be 1"),
        ({"asyncCommunication": False}, "asyncCommunication is False; it must be true"),
        ({"maxRetryTimeoutInSec": 2_147_484}, "above 2147483 TorchServe cannot count it"),
        ({"minWorkers": "1"}, "minWorkers is '1'; it must be a whole number"),
        ({"continuousBatching": True}, "continuousBatching is no key of TorchServe that this handler goes with"),
        ({"handler": {"max_duration": -1}}, "handler.max_duration"),
        ({"handler": {"nonsense": 1}}, "`handler.nonsense` is not a setting"),
        ({"startupTimeout": None}, "startupTimeout is None"),
    ],
)
def test_a_configuration_that_would_not_serve_is_refused(folder: Path, change: dict[str, Any], says: str) -> None:
    path = folder / "model-config.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | change))
    _resum(folder)
    assert says in _problems(folder)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[1]", "not a block"),
        ("a: [", "not YAML"),
        ("responseTimeout: 5", f"{next(iter(TORCHSERVE_SETTINGS))} is missing"),
    ],
)
def test_a_configuration_that_is_none_is_refused(folder: Path, text: str, says: str) -> None:
    (folder / "model-config.yaml").write_text(text)
    _resum(folder)
    assert says in _problems(folder)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda model: model.update(handler="other.py"), "model.handler is 'other.py'"),
        (lambda model: model.pop("configFile"), "model.configFile is None"),
        (lambda model: model.update(modelName="../x"), r"model.modelName is '../x'"),
        (lambda model: model.clear(), "is not one of TorchServe's"),
    ],
)
def test_a_manifest_that_would_not_serve_is_refused(
    folder: Path, change: Callable[[dict[str, str]], object], says: str
) -> None:
    path = folder / "MAR-INF" / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    change(manifest["model"])
    path.write_text(json.dumps(manifest))
    _resum(folder)
    assert says in _problems(folder)


@pytest.mark.parametrize("gone", ["t5-base", "encodec_32khz", "encodec_32khz/model.safetensors"])
def test_an_auxiliary_model_that_is_not_inside_is_named(folder: Path, gone: str) -> None:
    path = folder / "checkpoint" / "hub" / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    _resum(folder)
    assert gone.split("/")[0] in _problems(folder)


def test_a_model_that_does_not_rebuild_is_found_unless_that_is_left_out(folder: Path) -> None:
    shutil.copy(GOLDENS / "text_mono" / "state_dict.bin", folder / "checkpoint")
    _resum(folder)
    assert "they belong to different models" not in _problems(folder)
    (folder / "checkpoint" / "hub" / "t5-base" / "config.json").write_text("{}")
    _resum(folder)
    assert not _problems(folder)
    assert _problems(folder, rebuild=True)


@pytest.mark.parametrize(
    ("file", "name", "value"),
    [
        ("state_dict.bin", "transformer.layers.1.linear2.weight", math.nan),
        ("state_dict.bin", "condition_provider.conditioners.description.output_proj.bias", math.inf),
        ("hub/encodec_32khz/model.safetensors", "decoder.layers.0.conv.bias", -math.inf),
    ],
)
def test_one_weight_that_is_not_finite_is_refused_and_named(folder: Path, file: str, name: str, value: float) -> None:
    path = folder / "checkpoint" / file
    if path.suffix == ".safetensors":
        state = load_file(path)
        state[name].view(-1)[-1] = value
        save_file(state, path, metadata={"format": "pt"})
    else:
        package = torch.load(path, weights_only=True)
        package["best_state"][name].view(-1)[-1] = value
        torch.save(package, path)
    _resum(folder)
    found = _problems(folder, rebuild=True)
    assert path.name in found
    assert repr(name) in found
    assert "NaN" in found if math.isnan(value) else "infinity" in found


def test_a_model_that_diverges_is_refused_though_its_weights_are_finite(folder: Path) -> None:
    path = folder / "checkpoint" / "state_dict.bin"
    package = torch.load(path, weights_only=True)
    package["best_state"]["out_norm.weight"] = torch.full_like(package["best_state"]["out_norm.weight"].float(), 3e38)
    torch.save(package, path)
    _resum(folder)
    assert "its logits are not finite" in _problems(folder, rebuild=True)
