"""Everything a fine-tune may leave becomes a folder that loads, by the very command that the loader's message names."""

from __future__ import annotations

import gzip
import io
import re
import shlex
import shutil
import tarfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor, nn

from archive_scripts.__main__ import main
from archive_scripts.export import export
from handler.checkpoint import COMPRESSION_FILE, LM_FILE, Checkpoint, Pointer, read_checkpoint
from handler.errors import CheckpointError
from handler.musicgen import MusicGen
from handler.registry import resolve

GOLDENS = Path(__file__).resolve().parents[1] / "goldens"
PACKAGE: dict[str, Any] = torch.load(GOLDENS / "text_mono" / LM_FILE, weights_only=True)
STATE: dict[str, Tensor] = PACKAGE["best_state"]
CONFIG = OmegaConf.create(PACKAGE["xp.cfg"])


def named(*prefixes: str) -> dict[str, Tensor]:
    return {"".join(prefixes) + name: value for name, value in STATE.items()}


def torch_bytes(package: object, **settings: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(package, buffer, **settings)
    return buffer.getvalue()


def tar_of(files: Mapping[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


REPLICATE = torch_bytes({"xp.cfg": CONFIG, "model": STATE})
FORMS: dict[str, bytes] = {
    "the file of Replicate's fine-tuner": REPLICATE,
    "the same in a tar archive": tar_of({"out/model.pt": REPLICATE, "out/readme.txt": b"hello"}),
    "the same in a compressed tar archive": tar_of({"checkpoint.th": REPLICATE, "other.pt": b"x"}, "w:gz"),
    "the same, compressed": gzip.compress(REPLICATE, 1),
    "an export with a pickled configuration": torch_bytes({"best_state": STATE, "xp.cfg": CONFIG, "exported": True}),
    "a training checkpoint": torch_bytes({"best_state": {"model": STATE}, "xp.cfg": CONFIG, "optimizer": {}}),
    "a training checkpoint with its configuration as text": torch_bytes(
        {"best_state": {"model": STATE}, "xp.cfg": PACKAGE["xp.cfg"]}
    ),
    "a training checkpoint of an old torch": torch_bytes(
        {"best_state": {"model": STATE}, "xp.cfg": CONFIG}, _use_new_zipfile_serialization=False
    ),
    "an export of a compiled model": torch_bytes({**PACKAGE, "best_state": named("_orig_mod.")}),
    "an export of a wrapped model": torch_bytes({**PACKAGE, "best_state": named("module.", "_orig_mod.", "lm.")}),
    "its parameters alone": torch_bytes(STATE),
    "its parameters alone, ordered": torch_bytes(OrderedDict(STATE)),
    "its parameters alone, as nn.Parameter": torch_bytes({n: nn.Parameter(t, False) for n, t in STATE.items()}),
    "its parameters under module.": torch_bytes(named("module.")),
    "its parameters under _orig_mod.": torch_bytes(named("_orig_mod.")),
    "its parameters under model.": torch_bytes(named("model.")),
    "its parameters under lm.": torch_bytes(named("lm.")),
    "its parameters under model.lm.": torch_bytes(named("model.", "lm.")),
    "its parameters under _orig_mod.module.": torch_bytes(named("_orig_mod.", "module.")),
    "its parameters with compiled parts": torch_bytes(
        {name.replace("transformer.", "transformer._orig_mod.", 1): value for name, value in STATE.items()}
    ),
    "parameters of a class that holds a codec too": torch_bytes(
        {**named("lm."), "compression_model.encoder.model.0.conv.conv.bias": torch.zeros(3)}
    ),
    "parameters under state_dict": torch_bytes({"state_dict": named("model."), "epoch": 3}),
    "parameters under best_state alone": torch_bytes({"best_state": STATE}),
    "its parameters in an old torch's format": torch_bytes(STATE, _use_new_zipfile_serialization=False),
}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """What the fine-tune began from: the same architecture, other parameters."""
    folder = tmp_path / "base"
    shutil.copytree(GOLDENS / "hub" / "t5-base", folder / "hub" / "t5-base")
    shutil.copy(GOLDENS / "text_mono" / COMPRESSION_FILE, folder)
    torch.save({**PACKAGE, "best_state": {name: value + 1 for name, value in STATE.items()}}, folder / LM_FILE)
    return folder


def command_in(error: CheckpointError, base: Path) -> list[str]:
    """The one command of a message, to be copied but for the base's name."""
    [command] = re.findall(r"`python -m archive_scripts (export [^`]*)`", str(error))
    return [str(base) if word == "small" else word for word in shlex.split(command)]


def assert_is_the_model(folder: Path) -> None:
    exported = read_checkpoint(folder / LM_FILE)
    assert isinstance(exported, Checkpoint)
    assert exported.state.keys() == STATE.keys()
    for name, value in STATE.items():
        assert exported.state[name].dtype == value.dtype
        assert torch.equal(exported.state[name], value)
    text = torch.load(folder / LM_FILE, weights_only=True)["xp.cfg"]
    assert yaml.safe_load(text) == yaml.safe_load(PACKAGE["xp.cfg"])


@pytest.mark.parametrize("content", FORMS.values(), ids=FORMS)
def test_the_loader_names_the_command_that_makes_the_model_of_it(
    content: bytes, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "my fine-tune"
    shutil.copytree(base, folder)
    (folder / LM_FILE).write_bytes(content)
    with pytest.raises(CheckpointError) as error:
        MusicGen.get_pretrained(folder)
    assert str(folder / LM_FILE) in str(error.value)
    assert main(command_in(error.value, base)) == 0
    assert_is_the_model(tmp_path / "OUT")
    assert (tmp_path / "OUT" / "hub" / "t5-base" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", ["trained_model.tar", "lm_final.pt", "finetune.safetensors"])
def test_a_file_of_any_name_is_told_the_command_before_it_is_to_be_renamed(
    name: str, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if name.endswith(".safetensors"):
        save_file({key: value.contiguous() for key, value in STATE.items()}, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(REPLICATE if name.endswith(".tar") else torch_bytes(STATE))
    for given in (name, "."):
        with pytest.raises(CheckpointError) as error:
            resolve(f"./{name}" if given == name else tmp_path)
        command = command_in(error.value, base)
        command[1:1] = [] if "--base" in command else ["--base", str(base)]
        assert main(command) == 0
        assert_is_the_model(tmp_path / "OUT")
        shutil.rmtree(tmp_path / "OUT")


def test_bare_parameters_generate_the_original_s_tokens(base: Path, tmp_path: Path) -> None:
    (tmp_path / "lm_final.pt").write_bytes(torch_bytes(named("module.", "_orig_mod.")))
    assert main(["export", "--base", str(base), str(tmp_path / "lm_final.pt"), str(tmp_path / "out")]) == 0
    model = MusicGen.get_pretrained(tmp_path / "out")
    model.set_generation_params(use_sampling=False, duration=2.5)
    _, codes = model.generate(["happy rock"], return_tokens=True)
    golden = np.load(GOLDENS / "text_mono" / "gen_greedy.npz")["alone0_tokens"]
    assert np.array_equal(codes.numpy(), golden)


def test_an_export_under_another_name_is_exported_as_it_is(base: Path, tmp_path: Path) -> None:
    shutil.copy(GOLDENS / "text_mono" / LM_FILE, tmp_path / "mine.bin")
    shutil.copy(base / COMPRESSION_FILE, tmp_path)
    with pytest.raises(CheckpointError, match=r"Rename it.*Or: Export it first: `python -m archive_scripts export"):
        resolve(str(tmp_path / "mine.bin"))
    export(tmp_path / "mine.bin", tmp_path / "out")
    assert_is_the_model(tmp_path / "out")


def test_the_base_may_be_the_debug_model_and_another_size_is_refused(tmp_path: Path) -> None:
    debug = resolve("debug")
    state = torch.load(debug / LM_FILE, weights_only=True)["best_state"]
    torch.save(state, tmp_path / "lm_final.pt")
    export(tmp_path / "lm_final.pt", tmp_path / "out", base="debug")
    MusicGen.get_pretrained(tmp_path / "out")
    torch.save(STATE, tmp_path / "lm_final.pt")
    with pytest.raises(CheckpointError, match=r"has shape .* another model than debug, name that one with --base"):
        export(tmp_path / "lm_final.pt", tmp_path / "again", base="debug")
    assert not (tmp_path / "again").exists()


CODEC: dict[str, Any] = torch.load(GOLDENS / "text_mono" / COMPRESSION_FILE, weights_only=True)
CODECS: dict[str, Callable[[], bytes]] = {
    "a pickled configuration": lambda: torch_bytes(
        {"best_state": CODEC["best_state"], "xp.cfg": OmegaConf.create(CODEC["xp.cfg"]), "exported": True}
    ),
    "a training checkpoint": lambda: torch_bytes(
        {"best_state": {"model": CODEC["best_state"]}, "xp.cfg": OmegaConf.create(CODEC["xp.cfg"])}
    ),
    "parameters alone": lambda: torch_bytes({f"module.{name}": t for name, t in CODEC["best_state"].items()}),
}


@pytest.mark.parametrize("content", CODECS.values(), ids=CODECS)
def test_a_codec_that_is_no_export_is_told_its_command_too(
    content: Callable[[], bytes], base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "mine"
    shutil.copytree(base, folder)
    shutil.copy(GOLDENS / "text_mono" / LM_FILE, folder)
    (folder / COMPRESSION_FILE).write_bytes(content())
    with pytest.raises(CheckpointError) as error:
        MusicGen.get_pretrained(folder)
    assert main(command_in(error.value, base)) == 0
    MusicGen.get_pretrained("./OUT")
    made = torch.load(tmp_path / "OUT" / COMPRESSION_FILE, weights_only=True)["best_state"]
    assert all(torch.equal(made[name], value) for name, value in CODEC["best_state"].items())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (torch_bytes({"epoch": 3}), r"has no key 'best_state'.* none can be made of it"),
        (torch_bytes([1, 2]), r"holds a list.* no model can be made of it"),
        (torch_bytes({"decoder.model.decoder.layers.0.fc1.weight": torch.zeros(2)}), r"transformers' own layout"),
    ],
)
def test_what_no_export_can_be_made_of_is_said_so(content: bytes, says: str, base: Path, tmp_path: Path) -> None:
    (tmp_path / LM_FILE).write_bytes(content)
    with pytest.raises(CheckpointError, match=says) as error:
        read_checkpoint(tmp_path / LM_FILE)
    assert "archive_scripts export" not in str(error.value)
    with pytest.raises(CheckpointError):
        export(tmp_path / LM_FILE, tmp_path / "out", base=str(base))


def test_weights_of_transformers_end_in_a_true_statement(base: Path, tmp_path: Path) -> None:
    folder = tmp_path / "hub copy"
    folder.mkdir()
    save_file({"decoder.lm_heads.0.weight": torch.zeros(2)}, folder / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        resolve(str(folder))
    with pytest.raises(CheckpointError, match=r"transformers' own layout.*`python -m archive_scripts fetch"):
        export(Path(command_in(error.value, base)[-2]), tmp_path / "out", base=str(base))


def test_a_training_folder_in_the_place_of_a_checkpoint_is_told_its_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "97d170e1").mkdir()
    (tmp_path / "97d170e1" / "checkpoint.th").write_bytes(FORMS["a training checkpoint"])
    with pytest.raises(CheckpointError, match="This is a training folder") as error:
        resolve("./97d170e1")
    assert main([*command_in(error.value, base), "--base", str(base)]) == 0
    assert_is_the_model(tmp_path / "OUT")


def test_a_checkpoint_without_its_codec_is_told_its_command(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    shutil.copy(GOLDENS / "text_mono" / LM_FILE, tmp_path / "mine")
    with pytest.raises(CheckpointError, match=r"compression_state_dict\.bin missing.*add --base") as error:
        resolve("./mine")
    assert main([*command_in(error.value, base), "--base", str(base)]) == 0
    assert_is_the_model(tmp_path / "OUT")


def test_a_tar_archive_of_something_else_names_what_it_holds(base: Path, tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(tar_of({"readme.txt": b"hello", "../../evil": b"x"}))
    with pytest.raises(CheckpointError, match=r"no torch or safetensors file: readme\.txt, \.\./\.\./evil"):
        export(tmp_path / "a.tar", tmp_path / "out", base=str(base))
    (tmp_path / "a.tar").write_bytes(tar_of({"a.pt": REPLICATE, "b.pt": REPLICATE}))
    with pytest.raises(CheckpointError, match=r"several files that may be a checkpoint: a\.pt, b\.pt"):
        export(tmp_path / "a.tar", tmp_path / "out", base=str(base))


def test_a_pointer_is_no_language_model_and_names_its_place(base: Path, tmp_path: Path) -> None:
    torch.save({"pretrained": "facebook/encodec_32khz"}, tmp_path / "codec.bin")
    with pytest.raises(CheckpointError, match=r"is a pointer to the codec .* with --compression"):
        export(tmp_path / "codec.bin", tmp_path / "out", base=str(base))
    export(base / LM_FILE, tmp_path / "out", compression=tmp_path / "codec.bin")
    assert isinstance(read_checkpoint(tmp_path / "out" / COMPRESSION_FILE), Pointer)


def test_a_codec_pointer_to_a_folder_here_is_followed_when_it_is_exported(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "mine")
    torch.save({"pretrained": "../base"}, tmp_path / "mine" / COMPRESSION_FILE)
    export(tmp_path / "mine", tmp_path / "elsewhere" / "out")
    assert isinstance(read_checkpoint(tmp_path / "elsewhere" / "out" / COMPRESSION_FILE), Checkpoint)


def test_parameters_that_are_not_finite_are_not_exported(base: Path, tmp_path: Path) -> None:
    state = {name: value.clone() for name, value in STATE.items()}
    state["out_norm.weight"][3] = float("nan")
    torch.save(state, tmp_path / "lm_final.pt")
    with pytest.raises(CheckpointError, match=r"lm_final\.pt: 'out_norm\.weight' holds NaN \(1 of its"):
        export(tmp_path / "lm_final.pt", tmp_path / "out", base=str(base))
