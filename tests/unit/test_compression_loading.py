"""Checkpoints of both dialects: what they may hold, and what is said when they can't be used."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from handler.compression import EncodecModel, encodec_from_config, load_encodec, load_huggingface_encodec
from handler.compression.audiocraft import read_config
from handler.errors import CheckpointError

CONFIG: dict[str, Any] = {
    "compression_model": "encodec",
    "sample_rate": 60,
    "channels": 1,
    "encodec": {
        "autoencoder": "seanet",
        "quantizer": "rvq",
        "sample_rate": 60,
        "channels": 1,
        "causal": False,
        "renormalize": False,
    },
    "seanet": {
        "channels": 1,
        "dimension": 6,
        "n_filters": 4,
        "n_residual_layers": 1,
        "ratios": [3, 2],
        "activation": "ELU",
        "activation_params": {"alpha": 1.0},
        "norm": "weight_norm",
        "norm_params": {},
        "pad_mode": "constant",
        "lstm": 1,
        "disable_norm_outer_blocks": 0,
        "decoder": {"trim_right_ratio": 1.0, "final_activation": None, "final_activation_params": None},
        "encoder": {},
    },
    "rvq": {"n_q": 2, "bins": 16, "q_dropout": False, "kmeans_init": True, "decay": 0.99},
    "optim": {"lr": 3e-4},
}


def changed(**changes: Any) -> dict[str, Any]:
    """CONFIG with the given `section__key` values."""
    config = copy.deepcopy(CONFIG)
    for path, value in changes.items():
        *sections, key = path.split("__")
        part = config
        for section in sections:
            part = part[section]
        part[key] = value
    return config


def original(config: dict[str, Any]) -> EncodecModel:
    """A model as in training: random weights, not on the meta device."""
    torch.manual_seed(0)
    model = EncodecModel(read_config(config))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def exported(model: EncodecModel) -> dict[str, Tensor]:
    """The state dict of `model` with the codebooks named and accompanied as in an export."""
    state = {k: v.detach().clone() for k, v in model.state_dict().items() if "codebooks" not in k}
    for q, embed in enumerate(model.quantizer.codebooks):
        stem = f"quantizer.vq.layers.{q}._codebook"
        state[f"{stem}.embed"] = embed.detach().clone()
        state[f"{stem}.embed_avg"] = embed.detach() * 7
        state[f"{stem}.cluster_size"] = torch.ones(len(embed))
        state[f"{stem}.inited"] = torch.ones(1)
    return state


def convolutions(model: nn.Module) -> list[Any]:
    return [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.ConvTranspose1d)]


def assert_same(loaded: EncodecModel, reference: EncodecModel) -> None:
    wav = torch.randn(2, loaded.channels, 61, generator=torch.Generator().manual_seed(5))
    latent = reference.encoder(wav)
    torch.testing.assert_close(loaded.encoder(wav), latent, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(loaded.decoder(latent), reference.decoder(latent), rtol=1e-5, atol=1e-5)
    codes, scale = reference.encode(wav)
    assert torch.equal(loaded.encode(wav)[0], codes)
    torch.testing.assert_close(loaded.decode(codes, scale), reference.decode(codes, scale))


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_weight_norm_is_folded_as_torch_applies_it() -> None:
    model = original(CONFIG)
    for conv in convolutions(model):
        nn.utils.weight_norm(conv)
        nn.init.normal_(conv.weight_g, std=2.0)
    state = exported(model)
    assert "decoder.model.3.convtr.convtr.weight_g" in state
    assert_same(load_encodec(CONFIG, state, "x.bin"), model)


def test_parametrized_weight_norm_is_folded_as_torch_applies_it() -> None:
    model = original(CONFIG)
    for conv in convolutions(model):
        nn.utils.parametrizations.weight_norm(conv)
        nn.init.normal_(conv.parametrizations.weight.original0, std=2.0)
    assert_same(load_encodec(CONFIG, exported(model), "x.bin"), model)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_spectral_norm_is_folded_as_torch_applies_it() -> None:
    config = changed(seanet__norm="spectral_norm")
    model = original(config)
    for conv in convolutions(model):
        nn.utils.spectral_norm(conv, n_power_iterations=3)
    state = exported(model)
    assert "decoder.model.3.convtr.convtr.weight_orig" in state
    assert_same(load_encodec(config, state, "x.bin"), model)


@pytest.mark.parametrize("norm", ["none", "time_group_norm", "weight_norm"])
def test_plain_weights_load_under_every_norm(norm: str) -> None:
    config = changed(seanet__norm=norm, seanet__true_skip=False)
    state = exported(original(config))
    assert ("decoder.model.3.convtr.norm.weight" in state) == (norm == "time_group_norm")
    assert ("encoder.model.1.shortcut.conv.norm.weight" in state) == (norm == "time_group_norm")
    assert_same(load_encodec(config, state, "x.bin"), original(config))


def test_activations_with_weights_load() -> None:
    config = changed(seanet__activation="PReLU", seanet__activation_params={})
    assert_same(load_encodec(config, exported(original(config)), "x.bin"), original(config))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_every_dtype_ends_as_float32(dtype: torch.dtype) -> None:
    state = {k: v.to(dtype) for k, v in exported(original(CONFIG)).items()}
    model = load_encodec(CONFIG, state, "x.bin")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    name = "encoder.model.0.conv.conv.weight"
    assert torch.equal(model.state_dict()[name], state[name].float())


def test_a_loaded_model_is_whole_and_for_inference() -> None:
    model = load_encodec(CONFIG, exported(original(CONFIG)), "x.bin")
    assert not any(p.is_meta or p.requires_grad for p in model.parameters())
    assert not model.training
    assert all(p.is_meta for p in encodec_from_config(CONFIG).parameters())


def test_the_frame_rate_of_an_export_is_rounded_down() -> None:
    model = encodec_from_config(changed(encodec__sample_rate=65))
    assert model.frame_rate == 10.0
    assert isinstance(model.frame_rate, float)
    assert (model.sample_rate, model.hop_length, model.total_codebooks, model.cardinality) == (65, 6, 2, 16)


def test_the_overrides_of_encoder_and_decoder_win() -> None:
    config = changed(seanet__encoder={"lstm": 0}, seanet__decoder={"causal": True, "final_activation": "Tanh"})
    read = read_config(config)
    assert (read.encoder.lstm, read.encoder.causal, read.encoder.final_activation) == (0, False, None)
    assert (read.decoder.lstm, read.decoder.causal, read.decoder.final_activation) == (1, True, "Tanh")
    assert_same(load_encodec(config, exported(original(config)), "x.bin"), original(config))


def test_older_configurations_may_lack_keys_and_carry_others() -> None:
    config = changed(seanet__key_of_the_future=1, encodec__renorm=False, rvq__codebook_offset=0)
    for key in ("norm_params", "disable_norm_outer_blocks", "encoder", "pad_mode"):
        del config["seanet"][key]
    for key in ("renormalize", "sample_rate", "channels"):
        del config["encodec"][key]
    read = read_config(config)
    assert (read.sample_rate, read.encoder.pad_mode, read.renormalize) == (60, "reflect", False)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("compression_model", "dac", "compression_model is 'dac', and must be one of encodec"),
        (
            "encodec__autoencoder",
            "transformer",
            "encodec.autoencoder is 'transformer', and must be one of seanet",
        ),
        ("encodec__quantizer", "no_quant", "encodec.quantizer is 'no_quant', and must be one of rvq"),
        ("encodec__renormalize", "no", "encodec.renormalize is 'no', and must be true or false"),
        ("encodec__channels", 2, "encodec.channels is 2, and must be seanet.channels, 1"),
        ("encodec__sample_rate", None, "encodec.sample_rate is None, and must be an integer of at least 6"),
        ("seanet", [], r"seanet is \[\], and must be a mapping"),
        (
            "seanet__norm",
            "layer_norm",
            "seanet.norm is 'layer_norm', and must be one of none, spectral_norm,",
        ),
        ("seanet__pad_mode", "zeros", "seanet.pad_mode is 'zeros', and must be one of circular, constant,"),
        ("seanet__activation", "Snake", "seanet.activation is 'Snake', and torch refuses it"),
        ("seanet__activation_params", {"beta": 1}, "seanet.activation is 'ELU', and torch refuses it"),
        (
            "seanet__decoder__final_activation",
            "Snake",
            "seanet.decoder.final_activation is 'Snake', and torch",
        ),
        ("seanet__ratios", "32", "seanet.ratios is '32', and must be a list of positive integers"),
        ("seanet__ratios", [3, 0], "seanet.ratios is .*, and must be a list of positive integers"),
        ("seanet__lstm", -1, "seanet.lstm is -1, and must be an integer of at least 0"),
        ("seanet__dimension", 6.0, "seanet.dimension is 6.0, and must be an integer of at least 1"),
        (
            "seanet__disable_norm_outer_blocks",
            5,
            "disable_norm_outer_blocks is 5, and there are only 4 blocks",
        ),
        ("seanet__encoder", {"causal": 1}, "seanet.encoder.causal is 1, and must be true or false"),
        (
            "seanet__encoder",
            {"dimension": 8},
            "seanet.encoder and seanet.decoder disagree on dimension, 8 and 6",
        ),
        (
            "seanet__decoder__trim_right_ratio",
            1.5,
            "seanet.decoder.trim_right_ratio is 1.5, and must be a number",
        ),
        ("rvq__bins", "16", "rvq.bins is '16', and must be an integer"),
    ],
)
def test_a_configuration_that_cannot_be_honoured_names_the_key(path: str, value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=f"^x.bin: .*{message}"):
        load_encodec(changed(**{path: value}), {}, "x.bin")


def test_norm_params_that_torch_refuses_are_named() -> None:
    config = changed(seanet__norm="time_group_norm", seanet__norm_params={"groups": 3})
    with pytest.raises(CheckpointError, match=r"seanet.norm_params is \{'groups': 3\}, and torch refuses it"):
        encodec_from_config(config)


def test_missing_weights_are_named() -> None:
    state = exported(original(CONFIG))
    del state["encoder.model.0.conv.conv.weight"]
    with pytest.raises(CheckpointError, match=r"^x\.bin: missing 'encoder\.model\.0\.conv\.conv\.weight'; .*again$"):
        load_encodec(CONFIG, state, "x.bin")
    only_codebooks = {k: v for k, v in state.items() if k.startswith("quantizer")}
    with pytest.raises(CheckpointError, match=r"missing '.*', '.*', '.*' and \d+ more"):
        load_encodec(CONFIG, only_codebooks, "x.bin")
    del state["quantizer.vq.layers.1._codebook.embed"]
    with pytest.raises(CheckpointError, match=r"missing .*'quantizer\.vq\.layers\.1\._codebook\.embed'"):
        load_encodec(CONFIG, state, "x.bin")


def test_half_of_a_weight_norm_is_missing_its_other_half() -> None:
    state = exported(original(CONFIG))
    state["encoder.model.0.conv.conv.weight_v"] = state.pop("encoder.model.0.conv.conv.weight")
    with pytest.raises(CheckpointError, match=r"missing 'encoder\.model\.0\.conv\.conv\.weight_g'"):
        load_encodec(CONFIG, state, "x.bin")


def test_weights_of_another_shape_are_named() -> None:
    state = exported(original(CONFIG))
    with pytest.raises(CheckpointError, match=r"codebook\.embed' has shape \(16, 6\), expected \(32, 6\).*together$"):
        load_encodec(changed(rvq__bins=32), state, "x.bin")


def test_weights_nobody_asked_for_are_named() -> None:
    state = exported(original(CONFIG))
    with pytest.raises(CheckpointError, match=r"unexpected 'quantizer\.vq\.layers\.1\._codebook\.cluster_size', "):
        load_encodec(changed(rvq__n_q=1), state, "x.bin")
    key = "encoder.model.0.conv.conv.weight"
    state |= {f"{key}_g": torch.ones(4, 1, 1), f"{key}_v": state[key]}
    with pytest.raises(CheckpointError, match=r"unexpected 'encoder\.model\.0\.conv\.conv\.weight'; "):
        load_encodec(CONFIG, state, "x.bin")


HF_CONFIG: dict[str, Any] = {
    "model_type": "encodec",
    "sampling_rate": 60,
    "hidden_size": 6,
    "codebook_dim": 6,
    "codebook_size": 16,
    "num_filters": 4,
    "upsampling_ratios": [3, 2],
    "num_lstm_layers": 1,
    "target_bandwidths": [0.08],
    "use_causal_conv": False,
    "use_conv_shortcut": False,
    "pad_mode": "constant",
}


def hf_key(key: str) -> str:
    for ours, theirs in (
        (".model.", ".layers."),
        (".conv.conv.", ".conv."),
        (".convtr.convtr.", ".conv."),
        ("quantizer.vq.", "quantizer."),
        ("._codebook.", ".codebook."),
    ):
        key = key.replace(ours, theirs)
    return key


@pytest.fixture
def write_folder(tmp_path: Path) -> Callable[..., Path]:
    """Writes the Hugging Face folder of a model, with changes to its config.json."""

    def write(config: dict[str, Any] = CONFIG, **changes: Any) -> Path:
        (tmp_path / "config.json").write_text(json.dumps({**HF_CONFIG, **changes}))
        state = {hf_key(k): v.contiguous() for k, v in exported(original(config)).items()}
        save_file(state, tmp_path / "model.safetensors")
        return tmp_path

    return write


def test_a_hugging_face_folder_loads_from_safetensors_or_bin(write_folder: Callable[..., Path]) -> None:
    folder = write_folder()
    model = load_huggingface_encodec(folder)
    assert_same(model, original(CONFIG))
    assert (model.total_codebooks, model.frame_rate) == (2, 10.0)
    state = {hf_key(k): v for k, v in exported(original(CONFIG)).items()}
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert_same(load_huggingface_encodec(folder), original(CONFIG))


def test_the_frame_rate_of_a_hugging_face_folder_is_not_rounded(write_folder: Callable[..., Path]) -> None:
    folder = write_folder(sampling_rate=63, target_bandwidths=[0.084])
    assert load_huggingface_encodec(folder).frame_rate == 10.5


@pytest.mark.parametrize(
    ("rate", "bandwidths", "bins", "codebooks"),
    [
        (50, [2.2], 2048, 4),
        (50, [1.4], 128, 4),
        (75, [1.5, 3.0, 6.0, 12.0, 24.0], 1024, 32),
        (10, [0.04, 0.08], 16, 2),
    ],
)
def test_the_highest_bandwidth_says_how_many_codebooks(
    write_folder: Callable[..., Path], rate: int, bandwidths: list[float], bins: int, codebooks: int
) -> None:
    folder = write_folder(
        changed(rvq__n_q=codebooks, rvq__bins=bins),
        sampling_rate=rate * 6,
        target_bandwidths=bandwidths,
        codebook_size=bins,
    )
    assert load_huggingface_encodec(folder).total_codebooks == codebooks


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "dac", "model_type is 'dac', and must be one of encodec"),
        ("chunk_length_s", 1.0, "chunk_length_s is 1.0, and must be null"),
        (
            "norm_type",
            "layer_norm",
            "norm_type is 'layer_norm', and must be one of time_group_norm, weight_norm",
        ),
        ("pad_mode", "zeros", "pad_mode is 'zeros', and must be one of"),
        ("codebook_dim", 8, "codebook_dim is 8, and must be hidden_size, 6"),
        ("target_bandwidths", "all", "target_bandwidths is 'all', and must be a list of numbers"),
        ("target_bandwidths", [], r"target_bandwidths is \[\], and must hold one that pays for a codebook"),
        ("upsampling_ratios", 6, "upsampling_ratios is 6, and must be a list of positive integers"),
    ],
)
def test_a_hugging_face_configuration_that_cannot_be_honoured_names_the_key(
    write_folder: Callable[..., Path], key: str, value: Any, message: str
) -> None:
    with pytest.raises(CheckpointError, match=rf"config\.json: {message}"):
        load_huggingface_encodec(write_folder(**{key: value}))


def test_a_hugging_face_folder_with_unusable_files_says_which(write_folder: Callable[..., Path]) -> None:
    folder = write_folder()
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read .*; fetch it again"):
        load_huggingface_encodec(folder)
    weights.unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors or pytorch_model\.bin; fetch the whole"):
        load_huggingface_encodec(folder)
    (folder / "pytorch_model.bin").write_bytes(b"not a pickle")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin cannot be read: it is a text"):
        load_huggingface_encodec(folder)
    torch.save({"epoch": 3}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin: not a state dict of tensors"):
        load_huggingface_encodec(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json: not JSON"):
        load_huggingface_encodec(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match=r"config\.json: not a JSON object"):
        load_huggingface_encodec(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"config\.json: no such file"):
        load_huggingface_encodec(folder)
