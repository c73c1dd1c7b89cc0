from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from archive_scripts import archive as archive_module
from archive_scripts.__main__ import main
from archive_scripts.archive import HANDLER_PACKAGE
from archive_scripts.errors import CommandError
from archive_scripts.files import workspace
from archive_scripts.needs import needed_auxiliaries
from archive_scripts.pack import default_name, pack, pack_if_needed
from handler.debug_model import write_debug_checkpoint
from handler.errors import CheckpointError
from handler.settings import Settings
from tests.checkpoints import write_export

ROOT = Path(__file__).resolve().parents[2]
GOLDENS = ROOT / "tests" / "goldens"
HUB = GOLDENS / "hub"
OTHER_SUMS = "MAR-INF/SHA256SUMS"


@pytest.fixture(scope="module")
def mono(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pack(str(GOLDENS / "text_mono"), output=tmp_path_factory.mktemp("store"), hub_dir=HUB)


def _names(archive: Path) -> set[str]:
    with zipfile.ZipFile(archive) as held:
        return set(held.namelist())


def _text(archive: Path, member: str) -> str:
    with zipfile.ZipFile(archive) as held:
        return held.read(member).decode()


def test_the_archive_is_stored_uncompressed_and_alone_in_its_folder(mono: Path) -> None:
    with zipfile.ZipFile(mono) as held:
        assert {info.compress_type for info in held.infolist()} == {zipfile.ZIP_STORED}
    assert list(mono.parent.iterdir()) == [mono]
    assert mono.name == "text_mono.mar"


def test_the_checkpoint_is_inside_byte_for_byte(mono: Path) -> None:
    with zipfile.ZipFile(mono) as held:
        for file in ("state_dict.bin", "compression_state_dict.bin"):
            assert held.read(f"checkpoint/{file}") == (GOLDENS / "text_mono" / file).read_bytes()


def test_of_an_auxiliary_model_only_the_files_needed_are_inside(mono: Path) -> None:
    t5 = {name for name in _names(mono) if name.startswith("checkpoint/hub/")}
    wanted = ("config.json", "model.safetensors", "spiece.model", "tokenizer.json", "tokenizer_config.json")
    assert t5 == {f"checkpoint/hub/t5-base/{file}" for file in wanted}


def test_a_codec_stored_by_reference_is_packed_too(tmp_path: Path) -> None:
    archive = pack(str(GOLDENS / "stereo_hf"), name="stereo", output=tmp_path, hub_dir=HUB)
    codec = {name for name in _names(archive) if name.startswith("checkpoint/hub/encodec_32khz/")}
    assert {name.rsplit("/", 1)[1] for name in codec} == {"config.json", "model.safetensors"}


def test_the_archive_holds_this_tree_s_code_with_the_entry_at_its_root(mono: Path) -> None:
    code = {name for name in _names(mono) if name.endswith(".py")}
    package = {f"handler/{path.relative_to(HANDLER_PACKAGE)}" for path in HANDLER_PACKAGE.rglob("*.py")}
    assert code == package - {"handler/musicgen_handler.py"} | {"musicgen_handler.py"}
    assert not [name for name in _names(mono) if "__pycache__" in name or name.endswith(".pyc")]


def test_nothing_else_is_inside(mono: Path) -> None:
    known = ("checkpoint/hub/", "handler/")
    rest = {name for name in _names(mono) if not name.startswith(known)}
    assert rest == {
        "MAR-INF/MANIFEST.json",
        "MAR-INF/SHA256SUMS",
        "checkpoint/SHA256SUMS",
        "checkpoint/compression_state_dict.bin",
        "checkpoint/state_dict.bin",
        "model-config.yaml",
        "musicgen_handler.py",
    }


def test_the_checksums_are_those_of_every_file_under_checkpoint(mono: Path) -> None:
    lines = _text(mono, "checkpoint/SHA256SUMS").splitlines()
    sums = {path: digest for digest, path in (line.split("  ") for line in lines)}
    with zipfile.ZipFile(mono) as held:
        files = [n for n in held.namelist() if n.startswith("checkpoint/") and not n.endswith("SHA256SUMS")]
        assert sums == {n.removeprefix("checkpoint/"): hashlib.sha256(held.read(n)).hexdigest() for n in files}


def test_the_manifest_names_the_model_its_version_and_its_entry(tmp_path: Path) -> None:
    archive = pack(str(GOLDENS / "text_mono"), "pop", tmp_path, version="2.1", hub_dir=HUB)
    model = json.loads(_text(archive, "MAR-INF/MANIFEST.json"))["model"]
    assert model == {
        "modelName": "pop",
        "handler": "musicgen_handler.py",
        "modelVersion": "2.1",
        "configFile": "model-config.yaml",
    }


def test_the_model_config_is_read_back_by_the_handler(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--hub-dir", str(HUB), "--output", str(tmp_path), "--max-duration", "45"]
    assert main(["pack", str(GOLDENS / "text_mono"), *arguments]) == 0
    assert "text_mono.mar" in capsys.readouterr().out
    config = yaml.safe_load(_text(tmp_path / "text_mono.mar", "model-config.yaml"))
    assert config["asyncCommunication"] is True
    assert (config["minWorkers"], config["batchSize"], config["maxBatchDelay"]) == (1, 1, 1)
    assert config["maxRetryTimeoutInSec"] == 2147483
    assert Settings.from_model_config(config) == Settings(max_duration=45.0)


def test_the_code_in_an_archive_imports_without_this_tree(mono: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(mono) as held:
        held.extractall(tmp_path)
    check = "import handler.musicgen, musicgen_handler; print(handler.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(run.stdout.strip()) == tmp_path / "handler" / "__init__.py"


def test_the_checksums_outside_the_checkpoint_are_those_of_every_other_file(mono: Path) -> None:
    sums = {path: digest for digest, path in (line.split("  ") for line in _text(mono, OTHER_SUMS).splitlines())}
    with zipfile.ZipFile(mono) as held:
        files = [n for n in held.namelist() if not n.startswith("checkpoint/") and n != OTHER_SUMS]
        assert sums == {n: hashlib.sha256(held.read(n)).hexdigest() for n in files}


@pytest.mark.parametrize("name", ["melody", "style"])
def test_packing_twice_gives_the_same_bytes(name: str, tmp_path: Path) -> None:
    checkpoint = tmp_path / "copy"
    shutil.copytree(GOLDENS / name, checkpoint)  # files of another age
    first = pack(str(GOLDENS / name), "model", tmp_path / "first", hub_dir=HUB)
    second = pack(str(checkpoint), "model", tmp_path / "second", hub_dir=HUB)
    assert first.read_bytes() == second.read_bytes()


def test_a_folder_holds_what_the_file_does(mono: Path, tmp_path: Path) -> None:
    arguments = ["--hub-dir", str(HUB), "--output", str(tmp_path), "--format", "no-archive"]
    assert main(["pack", str(GOLDENS / "text_mono"), *arguments]) == 0
    folder = tmp_path / "text_mono"
    assert list(tmp_path.iterdir()) == [folder]
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == _names(mono)
    with zipfile.ZipFile(mono) as held:
        assert all((folder / name).read_bytes() == held.read(name) for name in files)


def test_a_folder_is_replaced_as_a_whole_but_only_if_it_is_an_archive(tmp_path: Path) -> None:
    source: dict[str, Any] = {"variant": str(GOLDENS / "text_mono"), "output": tmp_path, "hub_dir": HUB}
    folder = pack(**source, archive_format="no-archive")
    (folder / "stray").touch()
    pack(**source, archive_format="no-archive")
    assert not (folder / "stray").exists()
    assert list(tmp_path.iterdir()) == [folder]

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    with pytest.raises(CommandError, match="this folder is there and is no archive; choose another --name"):
        pack(**source, name="mine", archive_format="no-archive")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_htdemucs_is_packed_as_tensors_and_plain_json_alone(tmp_path: Path) -> None:
    archive = pack(str(GOLDENS / "melody"), output=tmp_path, hub_dir=HUB)
    inside = {name for name in _names(archive) if "htdemucs/" in name}
    folder = "checkpoint/hub/htdemucs"
    assert inside == {f"{folder}/htdemucs.json", f"{folder}/htdemucs.safetensors"}


def test_what_a_checkpoint_needs_is_read_from_its_own_files(tmp_path: Path) -> None:
    assert needed_auxiliaries(GOLDENS / "text_mono") == ["t5-base"]
    assert needed_auxiliaries(GOLDENS / "stereo_hf") == ["t5-base", "facebook/encodec_32khz"]
    assert needed_auxiliaries(GOLDENS / "melody") == ["htdemucs", "t5-base"]
    assert needed_auxiliaries(GOLDENS / "style") == ["MERT-v1-95M", "t5-base"]
    assert needed_auxiliaries(write_debug_checkpoint(tmp_path)) == ["t5-base"]


@pytest.mark.parametrize(
    ("pretrained", "needs"),
    [
        ("dac_44khz", ["t5-base", "descript/dac_44khz"]),
        ("debug_compression_model", ["t5-base"]),
        ("../export", ["t5-base"]),
        ("someone/codec", ["t5-base", "someone/codec"]),
    ],
)
def test_what_a_codec_s_pointer_needs_depends_on_what_it_names(
    pretrained: str, needs: list[str], tmp_path: Path
) -> None:
    shutil.copytree(GOLDENS / "text_mono", tmp_path / "export")
    checkpoint = _pointing(tmp_path / "checkpoint", pretrained)
    assert needed_auxiliaries(checkpoint) == needs


def test_a_style_model_that_listens_through_a_codec_needs_that_codec(tmp_path: Path) -> None:
    config = yaml.safe_load(torch.load(GOLDENS / "style" / "state_dict.bin", weights_only=True)["xp.cfg"])
    config["conditioners"]["self_wav"]["style"]["model_name"] = "encodec"
    write_export(tmp_path / "state_dict.bin", {}, config)
    shutil.copy(GOLDENS / "style" / "compression_state_dict.bin", tmp_path)
    assert sorted(needed_auxiliaries(tmp_path)) == ["facebook/encodec_32khz", "t5-base"]


def test_a_codec_on_this_machine_takes_the_place_of_its_pointer(tmp_path: Path) -> None:
    shutil.copytree(GOLDENS / "text_mono", tmp_path / "export")
    archive = pack(str(_pointing(tmp_path / "tune", "../export")), output=tmp_path, hub_dir=HUB)
    with zipfile.ZipFile(archive) as held:
        packed = held.read("checkpoint/compression_state_dict.bin")
    assert packed == (GOLDENS / "text_mono" / "compression_state_dict.bin").read_bytes()


def test_pointers_in_a_circle_are_refused(tmp_path: Path) -> None:
    _pointing(tmp_path / "one", "../two")
    _pointing(tmp_path / "two", "../one")
    with pytest.raises(CheckpointError, match="points back to itself"):
        needed_auxiliaries(tmp_path / "one")


def _pointing(folder: Path, pretrained: str) -> Path:
    folder.mkdir()
    shutil.copy(GOLDENS / "text_mono" / "state_dict.bin", folder)
    torch.save({"pretrained": pretrained}, folder / "compression_state_dict.bin")
    return folder


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["smal"], "Did you mean small"),
        (["./nowhere"], "no such file or folder"),
        ([str(GOLDENS / "text_mono"), "--name", "a b"], "--name a b: letters, digits"),
        ([str(GOLDENS / "text_mono"), "--version", "../1"], r"--version \.\./1"),
        ([str(GOLDENS / "text_mono"), "--max-duration", "-1"], "max_duration"),
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_leaves_nothing(
    arguments: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["pack", *arguments, "--hub-dir", str(HUB), "--output", str(tmp_path / "store")]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert re.search(says, message)
    assert not list(tmp_path.rglob("*.mar"))


@pytest.mark.faults
def test_a_full_disk_is_seen_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 1000, 1000))
    with pytest.raises(CommandError, match=r"are needed and 1\.0 kB are free on this disk"):
        pack(str(GOLDENS / "text_mono"), output=tmp_path, hub_dir=HUB)
    assert not list(tmp_path.iterdir())


def test_a_failure_while_writing_keeps_the_archive_that_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    archive = tmp_path / "text_mono.mar"
    archive.write_bytes(b"the old one")

    def fail(*arguments: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(archive_module, "copy_stream", fail)
    with pytest.raises(OSError, match="disk full"):
        pack(str(GOLDENS / "text_mono"), output=tmp_path, hub_dir=HUB)
    assert archive.read_bytes() == b"the old one"
    assert list(tmp_path.iterdir()) == [archive]


SLOW_PACK = """
import sys, time
from archive_scripts import archive
from archive_scripts.__main__ import end_in_order, main
def never_ends(*arguments):
    print("writing", flush=True)
    time.sleep(600)
archive.copy_stream = never_ends
"""


@pytest.mark.parametrize("archive_format", ["zip-store", "no-archive"])
@pytest.mark.parametrize("ending", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_pack_leaves_no_archive_and_the_next_one_nothing_of_it(
    ending: signal.Signals, archive_format: str, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    arguments = ["pack", str(GOLDENS / "text_mono"), "--hub-dir", str(HUB), "--output", str(store)]
    arguments += ["--format", archive_format]
    script = SLOW_PACK + "end_in_order()\nsys.exit(main())\n"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    packing = subprocess.Popen(
        [sys.executable, "-c", script, *arguments], env=environment, stdout=subprocess.PIPE, text=True
    )
    assert packing.stdout is not None
    assert packing.stdout.readline() == "writing\n"
    packing.send_signal(ending)
    code = packing.wait(timeout=60)
    packing.stdout.close()
    assert not [path for path in store.iterdir() if not path.name.startswith(".")]
    if ending != signal.SIGKILL:
        assert code == 130
        assert not list(store.iterdir())
    assert main(arguments) == 0
    assert len(list(store.iterdir())) == 1


def test_what_another_process_is_packing_is_left_alone(tmp_path: Path) -> None:
    with workspace(tmp_path, "small") as theirs:
        with workspace(tmp_path, "small") as ours:
            assert theirs != ours
            assert theirs.is_dir()
        assert [path.name for path in tmp_path.iterdir()] == [theirs.name]
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        ("debug", "debug"),
        ("facebook/musicgen-stereo-small", "stereo-small"),
        ("MusicGen-Melody", "melody"),
        ("someone/My_Jingles-2", "My_Jingles-2"),
        ("./a folder/", "a-folder"),
    ],
)
def test_a_model_is_named_after_its_variant(variant: str, name: str) -> None:
    assert default_name(variant) == name


def test_an_archive_is_packed_again_only_when_the_checkpoint_or_the_code_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, store = write_debug_checkpoint(tmp_path / "tune"), tmp_path / "store"
    archive = pack_if_needed(str(checkpoint), store)
    first = archive.stat().st_ino
    assert pack_if_needed(str(checkpoint), store).stat().st_ino == first

    os.utime(checkpoint / "state_dict.bin", (archive.stat().st_mtime + 5,) * 2)
    second = pack_if_needed(str(checkpoint), store).stat().st_mtime_ns
    os.utime(checkpoint / "state_dict.bin", (1, 1))
    assert pack_if_needed(str(checkpoint), store).stat().st_mtime_ns == second

    code = archive_module.handler_files()
    changed = tmp_path / "musicgen_handler.py"
    changed.write_text("# another entry\n")
    monkeypatch.setattr(archive_module, "handler_files", lambda: code | {"musicgen_handler.py": changed})
    pack_if_needed(str(checkpoint), store)
    assert _text(archive, "musicgen_handler.py") == "# another entry\n"

    archive.write_bytes(archive.read_bytes()[:1000])  # cut short
    assert zipfile.is_zipfile(pack_if_needed(str(checkpoint), store))
