"""Weights that are not numbers are refused by name, wherever they are read; all others load."""

from __future__ import annotations

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from handler.builders import build_conditioners, build_language_model, check_parameter
from handler.checkpoint import Checkpoint
from handler.compression import load_encodec, load_huggingface_encodec
from handler.compression.debug import debug_config, debug_encodec
from handler.conditioners.htdemucs import WEIGHTS_FILE, convert_htdemucs, load_htdemucs
from handler.conditioners.mert import load_mert
from handler.conditioners.t5 import T5Conditioner
from handler.errors import CheckpointError
from handler.finite import require_finite
from tests.checkpoints import lm_checkpoint

pytestmark = pytest.mark.faults

HUB = Path(__file__).resolve().parents[1] / "goldens" / "hub"
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_one_value_anywhere_is_found(dtype: torch.dtype, value: float) -> None:
    for size in (1, 7, 33, 1000):
        for place in {0, size // 2, size - 1}:
            tensor = torch.randn(size)
            tensor[place] = value
            with pytest.raises(CheckpointError, match=rf"^file\.bin: 'a\.b' holds (NaN|infinity) \(1 of its {size} "):
                require_finite(tensor.to(dtype), "a.b", "file.bin")


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_numbers_are_no_false_alarm(dtype: torch.dtype) -> None:
    for extreme in (torch.finfo(dtype).max, torch.finfo(dtype).min):
        require_finite(torch.full((3, 5000), extreme, dtype=torch.float64).to(dtype), "a", "file")


def test_whole_numbers_and_empty_tensors_are_let_be() -> None:
    require_finite(torch.tensor(3), "num_batches_tracked", "file")
    require_finite(torch.tensor(True), "inited", "file")
    require_finite(torch.empty(0), "empty", "file")


@pytest.mark.parametrize(
    ("value", "stored", "served"),
    [
        (1e5, torch.float32, torch.float16),
        (-65_520.0, torch.float32, torch.float16),
        (1e39, torch.float64, torch.float32),
        (3.4028e38, torch.float32, torch.bfloat16),
        (1e38, torch.bfloat16, torch.float16),
    ],
)
def test_what_becomes_infinite_in_the_dtype_it_is_served_in_is_named(
    value: float, stored: torch.dtype, served: torch.dtype
) -> None:
    tensor = torch.tensor([0.5, value], dtype=stored)
    require_finite(tensor, "a.b", "file.bin")
    with pytest.raises(CheckpointError, match=rf"file\.bin: 'a\.b' holds .* is infinity in {str(served)[6:]} .*dtype"):
        require_finite(tensor, "a.b", "file.bin", served)


def test_what_fits_the_dtype_it_is_served_in_loads() -> None:
    require_finite(torch.tensor([65_504.0, -65_519.0]), "a", "file", torch.float16)
    require_finite(torch.tensor([1e38]), "a", "file", torch.bfloat16)


BIASED = {"bias_attn": True, "bias_ff": True, "bias_proj": True, "layer_scale": 0.1, "qk_layer_norm": True}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_parameter_of_the_language_model_is_looked_at(value: float) -> None:
    for name in lm_checkpoint(BIASED).state:
        checkpoint = lm_checkpoint(BIASED)
        checkpoint.state[name].view(-1)[-1] = value
        with pytest.raises(CheckpointError, match=rf"state_dict\.bin: '{name}' holds"):
            load(checkpoint)


def load(checkpoint: Checkpoint) -> None:
    finalize(checkpoint)
    build_conditioners(checkpoint, Path)


def finalize(checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    check = partial(check_parameter, checkpoint, dtype)
    build_language_model(checkpoint).finalize(torch.device("cpu"), torch.float32, check=check)


def test_names_are_those_of_the_file() -> None:
    checkpoint = lm_checkpoint({"memory_efficient": False})
    for name in list(checkpoint.state):
        nested = name.replace("attn.", "attn.mha.").replace("attention.", "attention.mha.")
        checkpoint.state[nested] = checkpoint.state.pop(name)
    checkpoint.state["transformer.layers.1.cross_attention.mha.out_proj.weight"][0, 0] = math.nan
    with pytest.raises(CheckpointError, match=r"'transformer\.layers\.1\.cross_attention\.mha\.out_proj\.weight'"):
        finalize(checkpoint)


def test_a_weight_beyond_float16_is_named_when_that_is_served_and_loads_in_float32() -> None:
    checkpoint = lm_checkpoint()
    checkpoint.state["transformer.layers.0.linear1.weight"][3, 4] = 1e5
    finalize(checkpoint)
    with pytest.raises(CheckpointError, match=r"'transformer\.layers\.0\.linear1\.weight' holds 100000, .* in float16"):
        finalize(checkpoint, torch.float16)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_every_parameter_of_the_codec_is_looked_at(value: float) -> None:
    config = debug_config()
    state = {
        name.replace("quantizer.codebooks.", "quantizer.vq.layers.")
        + ("._codebook.embed" if "codebooks" in name else ""): t
        for name, t in debug_encodec().state_dict().items()
    }
    load_encodec(config, state, "codec.bin")
    for name, tensor in state.items():
        spoilt = tensor.clone()
        spoilt.view(-1)[0] = value
        with pytest.raises(CheckpointError, match=rf"codec\.bin: '{name}' holds"):
            load_encodec(config, {**state, name: spoilt}, "codec.bin")


def test_a_normalised_weight_of_zeros_has_no_direction_and_is_named(tmp_path: Path) -> None:
    folder = shutil.copytree(HUB / "encodec_32khz", tmp_path / "codec")
    state = load_file(folder / "model.safetensors")
    name = next(key for key in state if key.endswith("parametrizations.weight.original1"))
    state[name] = torch.zeros_like(state[name])
    save_file(state, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.safetensors: '.*weight' holds NaN"):
        load_huggingface_encodec(folder)


def spoil(path: Path, state: dict[str, Tensor]) -> str:
    """Puts a NaN into the middle one of the floating tensors; its name."""
    names = sorted(name for name, tensor in state.items() if tensor.is_floating_point() and tensor.numel() > 1)
    name = names[len(names) // 2]
    state[name].view(-1)[0] = math.nan
    save_file(state, path, metadata={"format": "pt"})
    return name


def test_auxiliary_models_are_looked_at(tmp_path: Path) -> None:
    t5 = shutil.copytree(HUB / "t5-base", tmp_path / "t5-base")
    name = spoil(t5 / "model.safetensors", load_file(t5 / "model.safetensors"))
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: '{name}' holds NaN"):
        T5Conditioner(t5, 8)
    mert = shutil.copytree(HUB / "MERT-v1-95M", tmp_path / "mert")
    spoil(mert / "model.safetensors", load_file(mert / "model.safetensors"))
    with pytest.raises(CheckpointError, match=r"model\.safetensors: '.*' holds NaN"):
        load_mert(mert)
    convert_htdemucs(HUB / "htdemucs", tmp_path / "demucs")
    name = spoil(tmp_path / "demucs" / WEIGHTS_FILE, load_file(tmp_path / "demucs" / WEIGHTS_FILE))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS_FILE}: '{name}' holds NaN"):
        load_htdemucs(tmp_path / "demucs")


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4c8334b0\nsize 841019693\n"
HTML = b"<!doctype html>\n<html><head><title>404</title></head></html>"


@pytest.mark.parametrize("content", [LFS, HTML, b""])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json", "spiece.model"]
)
def test_a_file_of_t5_that_is_another_kind_is_told_what_it_is(name: str, content: bytes, tmp_path: Path) -> None:
    t5 = shutil.copytree(HUB / "t5-base", tmp_path / "t5-base")
    (t5 / name).write_bytes(content)
    what = {LFS: r"a Git LFS pointer.*git lfs pull`", HTML: r"an HTML page", b"": r"an empty file"}[content]
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: it is {what}"):
        T5Conditioner(t5, 8)


@pytest.mark.parametrize(("folder", "load"), [("MERT-v1-95M", load_mert), ("encodec_32khz", load_huggingface_encodec)])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_file_of_another_auxiliary_model_that_is_another_kind_is_told_what_it_is(
    folder: str, load: Any, name: str, tmp_path: Path
) -> None:
    copy = shutil.copytree(HUB / folder, tmp_path / folder)
    (copy / name).write_bytes(LFS)
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read: it is a Git LFS pointer.*git lfs pull"):
        load(copy)


def test_weights_in_an_old_torch_s_format_are_read(tmp_path: Path) -> None:
    copy = shutil.copytree(HUB / "encodec_32khz", tmp_path / "codec")
    state = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").unlink()
    torch.save(state, copy / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    assert json.loads((copy / "config.json").read_text())["codebook_size"] == load_huggingface_encodec(copy).cardinality
