"""The style conditioner: its excerpt, its bounds, its config, and the models it builds on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from handler.checkpoint import Config
from handler.conditioners.base import WavInput
from handler.conditioners.excerpt import excerpt_start
from handler.conditioners.mert import load_mert, shortest_audio
from handler.conditioners.style import StyleConditioner, build_style
from handler.conditioners.style_encoder import EncodecFeatures, StyleQuantizer
from handler.errors import CheckpointError, RequestError

GOLDENS = Path(__file__).parents[1] / "goldens"
MERT = GOLDENS / "hub" / "MERT-v1-95M"
RATE = 32_000


def built(**changes: object) -> StyleConditioner:
    """The recorded model's conditioner with other config keys and random parameters."""
    config = yaml.safe_load(torch.load(GOLDENS / "style" / "state_dict.bin", weights_only=True)["xp.cfg"])
    config["conditioners"]["self_wav"]["style"].update(changes)
    root = Config.parse(yaml.safe_dump(config), "state_dict.bin")
    section = root.section("conditioners").section("self_wav").section("style")
    conditioner = build_style(root, section, {}, lambda name: GOLDENS / "hub" / name.rpartition("/")[2])
    generator = torch.Generator().manual_seed(5)
    for name, tensor in conditioner.state_dict().items():
        if name.endswith("running_var"):
            tensor.fill_(1.0)
        elif tensor.is_floating_point():
            tensor.normal_(0.0, 0.05, generator=generator)
    return conditioner.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def style() -> StyleConditioner:
    return built(use_middle_of_segment=False)


def noise(seconds: float) -> Tensor:
    return 0.1 * torch.randn(int(seconds * RATE), generator=torch.Generator().manual_seed(1))


def field_and_message(style: StyleConditioner, wav: Tensor, **params: object) -> tuple[str | None, str]:
    with pytest.raises(RequestError) as caught:
        style(WavInput(wav, RATE, **params))  # type: ignore[arg-type]
    return caught.value.field, caught.value.message


def test_a_drawn_excerpt_is_a_function_of_the_seed(style: StyleConditioner) -> None:
    wav = noise(4.0)
    first = style(WavInput(wav, RATE, seed=7)).embedding
    assert first.shape == (1, 15, 64)
    assert torch.equal(style(WavInput(wav, RATE, seed=7)).embedding, first)
    assert not torch.equal(style(WavInput(wav, RATE, seed=8)).embedding, first)


def test_drawn_starts_cover_the_audio_and_nothing_else() -> None:
    starts = [excerpt_start(seed, 9) for seed in range(300)]
    assert set(starts) == set(range(10))
    assert excerpt_start(2**63 - 1, 0) == 0


def test_an_excerpt_may_be_the_whole_audio(style: StyleConditioner) -> None:
    wav = noise(3.0)
    one, other = (style(WavInput(wav, RATE, seed=seed)).embedding for seed in (1, 2))
    assert torch.equal(one, other)


def test_an_excerpt_longer_than_the_audio_is_told_with_both_lengths(style: StyleConditioner) -> None:
    field, message = field_and_message(style, noise(2.5))
    assert field == "excerpt_length"
    assert "3 s" in message
    assert "2.5 s" in message
    assert field_and_message(style, torch.zeros(1))[0] == "excerpt_length"


@pytest.mark.parametrize(
    ("params", "bound"),
    [
        ({"eval_q": 0}, "1 to this model's 6"),
        ({"eval_q": 7}, "1 to this model's 6"),
        ({"ds_factor": 0}, "1 or more"),
        ({"excerpt_length": 0.0}, "at least 0.017 s"),
        ({"excerpt_length": -1.0}, "at least 0.017 s"),
        ({"excerpt_length": float("nan")}, "number of seconds"),
        ({"encodec_n_q": 1}, "MERT"),
    ],
)
def test_a_param_out_of_bounds_is_told_by_its_name(
    style: StyleConditioner, params: dict[str, float], bound: str
) -> None:
    field, message = field_and_message(style, noise(3.0), **params)
    assert field == next(iter(params))
    assert bound in message


def test_the_shortest_excerpt_makes_one_vector(style: StyleConditioner) -> None:
    assert shortest_audio(load_mert(MERT)) == 400
    assert style(WavInput(noise(0.017), RATE, excerpt_length=0.017)).embedding.shape == (1, 1, 64)


def test_silence_has_a_style(style: StyleConditioner) -> None:
    assert style(WavInput(torch.zeros(4 * RATE), RATE)).embedding.isfinite().all()


def test_fewer_codebooks_keep_less(style: StyleConditioner) -> None:
    wav = noise(3.0)
    embeddings = [style(WavInput(wav, RATE, eval_q=q)).embedding for q in (1, 3, 6)]
    assert not torch.equal(embeddings[0], embeddings[1])
    assert torch.equal(style(WavInput(wav, RATE)).embedding, embeddings[1])


def test_downsampling_keeps_every_so_manieth_vector(style: StyleConditioner) -> None:
    every = style(WavInput(noise(3.0), RATE, ds_factor=1)).embedding
    assert every.shape == (1, 224, 64)
    assert torch.allclose(style(WavInput(noise(3.0), RATE, ds_factor=7)).embedding, every[:, ::7], atol=1e-6)


def test_audio_at_another_rate_is_resampled_first(style: StyleConditioner) -> None:
    assert style(WavInput(torch.zeros(3 * 16_000), 16_000)).embedding.shape == (1, 15, 64)


def test_the_parts_that_a_config_leaves_out_are_not_there() -> None:
    plain = built(transformer_scale="none", n_q_out=0, batch_norm=False)
    names = {name.split(".")[0] for name in plain.state_dict()}
    assert names == {"output_proj", "embed"}
    assert plain.output_proj.in_features == 512
    assert plain(WavInput(noise(3.0), RATE)).embedding.shape == (1, 15, 64)
    assert field_and_message(plain, noise(3.0), eval_q=1)[0] == "eval_q"


def test_the_published_scale_is_512_wide_with_8_layers() -> None:
    state = built(transformer_scale="default", bins=1024).state_dict()
    assert state["embed.weight"].shape == (512, 768)
    assert state["transformer.layers.7.linear1.weight"].shape == (2048, 512)
    assert "transformer.layers.8.linear1.weight" not in state
    assert state["rvq.vq.layers.5._codebook.embed"].shape == (1024, 512)


def test_a_quantizer_sums_the_nearest_rows() -> None:
    quantizer = StyleQuantizer(dim=2, num_codebooks=2, bins=2)
    first, second = torch.tensor([[1.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.25, 0.0], [0.0, 0.25]])
    for q, rows in enumerate((first, second)):
        quantizer.state_dict()[f"vq.layers.{q}._codebook.embed"].copy_(rows)
    x = torch.tensor([[[1.3, 0.1], [0.1, 1.3]]])
    assert torch.equal(quantizer(x, 1), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]))
    assert torch.equal(quantizer(x, 2), torch.tensor([[[1.25, 0.0], [0.0, 1.25]]]))


def test_features_can_be_the_codes_of_a_compression_model() -> None:
    style = built(model_name="encodec", encodec_n_q=3, use_middle_of_segment=True, transformer_scale="none")
    features = style.embed
    assert isinstance(features, EncodecFeatures)
    state = style.state_dict()
    assert [name for name in state if name.startswith("embed.")] == [f"embed.{k}.weight" for k in range(3)]
    wav = noise(3.0)
    codes, _ = features._model[0].encode(wav[None, None])
    for num_codebooks in (1, 3):
        expected = sum(state[f"embed.{k}.weight"][codes[:, k]] for k in range(num_codebooks))
        assert torch.allclose(features(wav[None], num_codebooks), torch.as_tensor(expected), atol=1e-6)
    whole = style(WavInput(wav, RATE)).embedding
    assert whole.shape == (1, 10, 64)  # 150 frames, one of 15
    assert not torch.equal(style(WavInput(wav, RATE, encodec_n_q=1)).embedding, whole)
    assert field_and_message(style, wav, encodec_n_q=4) == ("encodec_n_q", "must be 1 to this model's 3, not 4")


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"model_name": "clap"}, "model_name"),
        ({"transformer_scale": "huge"}, "transformer_scale"),
        ({"eval_q": 7}, "eval_q"),
        ({"eval_q": 0}, "eval_q"),
        ({"ds_factor": 0}, "ds_factor"),
        ({"length": 0}, "length"),
        ({"batch_norm": "yes"}, "batch_norm"),
        ({"noise_level": 0.5}, "noise_level"),
        ({"model_name": "encodec", "encodec_checkpoint": "//sig/bd44a852"}, "encodec_checkpoint"),
        ({"model_name": "encodec", "sample_rate": 24_000}, "encodec_checkpoint"),
        ({"model_name": "encodec", "encodec_n_q": 9}, "encodec_n_q"),
    ],
)
def test_a_key_that_cannot_be_honoured_is_told_by_its_name(changes: dict[str, object], key: str) -> None:
    with pytest.raises(CheckpointError, match=rf"conditioners\.self_wav\.style\.{key}"):
        built(**changes)


def test_keys_of_training_have_no_effect() -> None:
    wav = noise(3.0)
    changed = built(q_dropout=False, varying_lengths=None, compute_mask=False, rvq_threshold_ema_dead_code=0.0)
    assert torch.equal(changed(WavInput(wav, RATE)).embedding, built()(WavInput(wav, RATE)).embedding)


def test_the_pretrained_model_moves_along_but_is_no_parameter() -> None:
    style = built()
    assert not any("encoder" in name for name in style.state_dict())
    style.to("meta")
    assert all(parameter.is_meta for parameter in style.embed._model[0].parameters())


def mert_folder(folder: Path, state: dict[str, Tensor], **config: object) -> Path:
    torch.save(state, folder / "pytorch_model.bin")
    original = json.loads((MERT / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(original | config))
    return folder


def published(prefix: str = "") -> dict[str, Tensor]:
    """MERT's state as it is published: torch's old names of weight norm, and perhaps a prefix."""
    renamed = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
    state = {}
    for name, tensor in load_file(MERT / "model.safetensors").items():
        for new, old in renamed.items():
            name = name.replace(new, old)
        state[prefix + name] = tensor
    return state


@pytest.mark.parametrize("prefix", ["", "hubert."])
def test_mert_loads_whole_from_its_published_names(tmp_path: Path, prefix: str) -> None:
    heads = {"final_proj.weight": torch.zeros(2, 2), "label_embs_concat": torch.zeros(3)}
    folder = mert_folder(tmp_path, published(prefix) | heads, model_type="mert_model", attention_relax=-1.0)
    mert, reference = load_mert(folder), load_mert(MERT)
    for name, tensor in reference.state_dict().items():
        assert tensor.dtype == torch.float32
        assert torch.equal(mert.state_dict()[name], tensor), name
    excerpt = noise(0.5)[None]
    assert torch.equal(mert(excerpt).last_hidden_state, reference(excerpt).last_hidden_state)
    assert not mert.training


@pytest.mark.parametrize("name", ["encoder.pos_conv_embed.conv.weight_g", "encoder.layers.0.final_layer_norm.bias"])
def test_mert_with_a_missing_tensor_is_refused(tmp_path: Path, name: str) -> None:
    state = published()
    del state[name]
    missing = name.replace("weight_g", "parametrizations.weight.original0")
    with pytest.raises(CheckpointError, match=missing):
        load_mert(mert_folder(tmp_path, state))


def test_mert_with_an_unknown_or_misshaped_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="surprise"):
        load_mert(mert_folder(tmp_path, published() | {"surprise": torch.zeros(1)}))
    state = published()
    state["encoder.layer_norm.bias"] = torch.zeros(3)
    with pytest.raises(CheckpointError, match=r"encoder\.layer_norm\.bias"):
        load_mert(mert_folder(tmp_path, state))


@pytest.mark.parametrize(
    "change", [{"feature_extractor_cqt": True}, {"deepnorm": True}, {"attention_relax": 32.0}, {"hidden_size": "many"}]
)
def test_a_mert_that_is_no_plain_hubert_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    with pytest.raises(CheckpointError, match=next(iter(change))):
        load_mert(mert_folder(tmp_path, published(), **change))


def test_mert_runs_no_code_of_its_folder(tmp_path: Path) -> None:
    folder = mert_folder(tmp_path, published(), auto_map={"AutoModel": "modeling.Evil"})
    (folder / "modeling.py").write_text("raise SystemExit('the folder ran')")
    assert load_mert(folder).config.hidden_size == 768


def test_a_mert_folder_without_its_files_is_told(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"config\.json"):
        load_mert(tmp_path)
    shutil.copy(MERT / "config.json", tmp_path)
    with pytest.raises(CheckpointError, match=r"model\.safetensors or pytorch_model\.bin"):
        load_mert(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match="cannot be read: it is a text"):
        load_mert(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        load_mert(tmp_path)


def test_safetensors_come_before_pickles(tmp_path: Path) -> None:
    save_file(load_file(MERT / "model.safetensors"), tmp_path / "model.safetensors")
    folder = mert_folder(tmp_path, {})
    assert load_mert(folder).config.num_hidden_layers == 1
