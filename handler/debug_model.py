"""The debug model: a tiny MusicGen with random weights, in the published checkpoint format.

It exercises everything a real checkpoint does (float16 export, unresolved configuration, weight-normalised
codec, T5 with its tokenizer) at a size that loads in a second, so that trials and tests need no download. It
sounds like noise. Every byte follows from the fixed seed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path

import torch
import yaml
from torch import Tensor

SEED = 2036

# The language model.
CODEBOOKS, CARDINALITY = 4, 1024
DIM, HEADS, LAYERS, FEED_FORWARD = 64, 4, 2, 256
# The codec: 32 kHz, 8*5*4*4 = 640 samples a frame, 50 frames a second.
RATIOS, FILTERS, LATENT = (8, 5, 4, 4), 4, 16
# The decoder's last gain and bias, measured so that a clip has an RMS near 0.1, no offset, and stays clear of
# full scale.
GAIN, BIAS = 0.1, -0.031
# The text encoder; 768 is what every published MusicGen expects of T5-base.
T5_DIM, T5_HEADS, T5_HEAD_DIM, T5_LAYERS, T5_FEED_FORWARD = 768, 4, 16, 2, 64
SENTINELS = 100

WORDS = """
a acoustic ambient and bass beat beats bells blues bright calm cello chords choir cinematic classical
country dance dark deep disco dreamy driving drum drums dub edm electric electro electronic energetic
epic fast fiddle flute folk funk fuzzy guitar guitars happy hard harp heavy hip hop house in jazz latin
light lofi loud love melody mellow metal minor of orchestra organ pad percussion piano pop punk quiet rap
reggae rhythm rock sad saxophone slow smooth soft solo song soul sound strings summer swing synth synths
tempo the trap trumpet upbeat violin vocals warm wild with
"""
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,;:!?'\"()&+-/#ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def write_debug_checkpoint(folder: str | Path) -> Path:
    """Write `state_dict.bin`, `compression_state_dict.bin` and `hub/t5-base/` into `folder`, made if need be.

    Returns the folder. Files of these names are replaced; the same bytes come out every time.
    """
    folder = Path(folder)
    t5 = folder / "hub" / "t5-base"
    t5.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(SEED)
    pieces = _pieces()
    _export(folder / "state_dict.bin", _language_model(generator), _language_model_config())
    _export(folder / "compression_state_dict.bin", _codec(generator), _codec_config())
    _write_t5(t5, generator, vocabulary=len(pieces))
    _write_tokenizer(t5, pieces)
    return folder


def cached_debug_checkpoint(cache_dir: str | Path | None = None) -> Path:
    """The debug checkpoint, written once per version of this file below `cache_dir` (default: Hugging Face's
    home).

    Where that cannot be written, a folder in the system's temporary directory is used.
    """
    from huggingface_hub import constants

    version = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:12]
    roots = (
        Path(cache_dir or constants.HF_HOME) / "musicgen-debug",
        Path(tempfile.gettempdir()) / "musicgen-debug",
    )
    for root in roots:
        if (root / version).is_dir():
            return root / version
    for root in roots[:-1]:
        try:
            return _write_atomically(root, version)
        except OSError:
            continue
    return _write_atomically(roots[-1], version)


def _write_atomically(root: Path, version: str) -> Path:
    root.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{version}-", dir=root))
    try:
        write_debug_checkpoint(beside)
        os.rename(beside, root / version)
    except OSError:
        shutil.rmtree(beside, ignore_errors=True)
        if not (root / version).is_dir():  # else another process was first, with the same bytes
            raise
    return root / version


def _export(path: Path, state: dict[str, Tensor], config: str) -> None:
    torch.save({"best_state": state, "xp.cfg": config, "version": "1.4.0a2", "exported": True}, path)


def _normal(generator: torch.Generator, *shape: int, std: float) -> Tensor:
    return torch.randn(shape, generator=generator) * std


def _language_model(generator: torch.Generator) -> dict[str, Tensor]:
    """Flat state, float16 as published. The logits come out with a standard deviation near 1."""
    std = DIM**-0.5
    state = {
        "condition_provider.conditioners.description.output_proj.weight": _normal(
            generator, DIM, T5_DIM, std=T5_DIM**-0.5
        ),
        "condition_provider.conditioners.description.output_proj.bias": torch.zeros(DIM),
    }
    for k in range(CODEBOOKS):
        state[f"emb.{k}.weight"] = _normal(generator, CARDINALITY + 1, DIM, std=0.5)
    for i in range(LAYERS):
        layer = f"transformer.layers.{i}"
        for attention in ("self_attn", "cross_attention"):
            state[f"{layer}.{attention}.in_proj_weight"] = _normal(generator, 3 * DIM, DIM, std=std)
            state[f"{layer}.{attention}.out_proj.weight"] = _normal(generator, DIM, DIM, std=std)
        state[f"{layer}.linear1.weight"] = _normal(generator, FEED_FORWARD, DIM, std=std)
        state[f"{layer}.linear2.weight"] = _normal(generator, DIM, FEED_FORWARD, std=FEED_FORWARD**-0.5)
        for norm in ("norm1", "norm_cross", "norm2"):
            state |= _unit_norm(f"{layer}.{norm}", DIM)
    state |= _unit_norm("out_norm", DIM)
    for k in range(CODEBOOKS):
        state[f"linears.{k}.weight"] = _normal(generator, CARDINALITY, DIM, std=std)
    return {key: value.half() for key, value in state.items()}


def _unit_norm(name: str, dim: int) -> dict[str, Tensor]:
    return {f"{name}.weight": torch.ones(dim), f"{name}.bias": torch.zeros(dim)}


def _codec(generator: torch.Generator) -> dict[str, Tensor]:
    """EnCodec's state, float32: SEANet encoder and decoder of weight-normalised convolutions, LSTMs,
    codebooks."""
    state: dict[str, Tensor] = {}

    def convolution(name: str, out: int, into: int, kernel: int, norm: float = 1.0) -> None:
        state.update(_weight_norm(generator, name, (out, into, kernel), out, norm))

    def residual(name: str, channels: int) -> None:
        convolution(f"{name}.block.1.conv.conv", channels // 2, channels, 3)
        convolution(f"{name}.block.3.conv.conv", channels, channels // 2, 1)

    channels = FILTERS
    convolution("encoder.model.0.conv.conv", channels, 1, 7)
    index = 1
    for ratio in reversed(RATIOS):
        residual(f"encoder.model.{index}", channels)
        convolution(f"encoder.model.{index + 2}.conv.conv", 2 * channels, channels, 2 * ratio)
        channels, index = 2 * channels, index + 3
    state |= _lstm(generator, f"encoder.model.{index}.lstm", channels)
    convolution(f"encoder.model.{index + 2}.conv.conv", LATENT, channels, 7)

    convolution("decoder.model.0.conv.conv", channels, LATENT, 7)
    state |= _lstm(generator, "decoder.model.1.lstm", channels)
    index = 3
    for ratio in RATIOS:
        # A transposed convolution's first axis is its input; each output sample sees two taps of every input
        # channel, so this norm keeps the variance.
        shape, norm = (channels, channels // 2, 2 * ratio), math.sqrt(ratio / 2)
        state |= _weight_norm(generator, f"decoder.model.{index}.convtr.convtr", shape, channels // 2, norm)
        channels, index = channels // 2, index + 3
        residual(f"decoder.model.{index - 2}", channels)
    convolution(f"decoder.model.{index}.conv.conv", 1, channels, 7, norm=GAIN)
    state[f"decoder.model.{index}.conv.conv.bias"].fill_(BIAS)

    for q in range(CODEBOOKS):
        codebook = f"quantizer.vq.layers.{q}._codebook"
        embed = _normal(generator, CARDINALITY, LATENT, std=0.7**q)
        state[f"{codebook}.inited"] = torch.ones(1)
        state[f"{codebook}.cluster_size"] = torch.ones(CARDINALITY)
        state[f"{codebook}.embed"] = embed
        state[f"{codebook}.embed_avg"] = embed.clone()
    return state


def _weight_norm(
    generator: torch.Generator, name: str, shape: tuple[int, int, int], bias: int, norm: float
) -> dict[str, Tensor]:
    return {
        f"{name}.bias": torch.zeros(bias),
        f"{name}.weight_g": torch.full((shape[0], 1, 1), norm),
        f"{name}.weight_v": _normal(generator, *shape, std=1.0),
    }


def _lstm(generator: torch.Generator, name: str, channels: int) -> dict[str, Tensor]:
    state = {}
    for layer in range(2):
        for kind in ("ih", "hh"):
            weight = _normal(generator, 4 * channels, channels, std=channels**-0.5)
            state[f"{name}.weight_{kind}_l{layer}"] = weight
            state[f"{name}.bias_{kind}_l{layer}"] = torch.zeros(4 * channels)
    return state


def _write_t5(folder: Path, generator: torch.Generator, vocabulary: int) -> None:
    from safetensors.torch import save

    inner = T5_HEADS * T5_HEAD_DIM
    std = T5_DIM**-0.5
    state = {"shared.weight": _normal(generator, vocabulary, T5_DIM, std=1.0)}
    for i in range(T5_LAYERS):
        attention, feed_forward = f"encoder.block.{i}.layer.0", f"encoder.block.{i}.layer.1"
        for projection in "qkv":
            # T5 has no attention scale; it is part of the weights.
            scale = T5_HEAD_DIM**-0.5 if projection == "q" else 1.0
            weight = _normal(generator, inner, T5_DIM, std=std * scale)
            state[f"{attention}.SelfAttention.{projection}.weight"] = weight
        state[f"{attention}.SelfAttention.o.weight"] = _normal(generator, T5_DIM, inner, std=inner**-0.5)
        if i == 0:
            bias = _normal(generator, 32, T5_HEADS, std=1.0)  # one row a relative position bucket
            state[f"{attention}.SelfAttention.relative_attention_bias.weight"] = bias
        state[f"{attention}.layer_norm.weight"] = torch.ones(T5_DIM)
        state[f"{feed_forward}.DenseReluDense.wi.weight"] = _normal(generator, T5_FEED_FORWARD, T5_DIM, std=std)
        state[f"{feed_forward}.DenseReluDense.wo.weight"] = _normal(
            generator, T5_DIM, T5_FEED_FORWARD, std=T5_FEED_FORWARD**-0.5
        )
        state[f"{feed_forward}.layer_norm.weight"] = torch.ones(T5_DIM)
    state["encoder.final_layer_norm.weight"] = torch.ones(T5_DIM)
    (folder / "model.safetensors").write_bytes(save(state, metadata={"format": "pt"}))
    config = {
        "architectures": ["T5EncoderModel"],
        "model_type": "t5",
        "d_model": T5_DIM,
        "d_kv": T5_HEAD_DIM,
        "d_ff": T5_FEED_FORWARD,
        "num_heads": T5_HEADS,
        "num_layers": T5_LAYERS,
        "relative_attention_num_buckets": 32,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "relu",
        "layer_norm_epsilon": 1e-6,
        "dropout_rate": 0.1,
        "vocab_size": vocabulary,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "is_encoder_decoder": False,
        "use_cache": False,
        "dtype": "float32",
    }
    _write_json(folder / "config.json", config)


def _pieces() -> list[tuple[str, float]]:
    """The unigram vocabulary with log-probabilities, in T5's order: special tokens, pieces, sentinels
    counting down."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -4.0)]
    pieces += [(f"\u2581{word}", -6.0 - 0.01 * i) for i, word in enumerate(WORDS.split()) if len(word) > 1]
    pieces += [(f"\u2581{digit}0s", -7.0) for digit in range(10)]
    pieces += [(character, -8.0 - 0.01 * i) for i, character in enumerate(CHARACTERS)]
    return pieces + [(f"<extra_id_{i}>", 0.0) for i in reversed(range(SENTINELS))]


def _write_tokenizer(folder: Path, pieces: list[tuple[str, float]]) -> None:
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme="always")]
    )
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    sentinels = [f"<extra_id_{i}>" for i in range(SENTINELS)]
    special = ["<pad>", "</s>", "<unk>", *reversed(sentinels)]
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "T5Tokenizer",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "extra_ids": SENTINELS,
        "additional_special_tokens": sentinels,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 512,
    }
    _write_json(folder / "tokenizer_config.json", config)


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _language_model_config() -> str:
    """`xp.cfg` of the language model: what inference reads, and enough of the training half to look like the
    real one, interpolations unresolved."""
    return _yaml(
        {
            "device": "cuda",
            "dtype": "float32",
            "autocast": True,
            "autocast_dtype": "float16",
            "seed": SEED,
            "solver": "musicgen",
            "dora": {"dir": "/checkpoint/${oc.env:USER}/experiments"},
            "dataset": {"batch_size": 192, "segment_duration": 30, "train": {"merge_text_p": 0.25}},
            "generate": {"audio": {"format": "wav", "strategy": "loudness", "sample_rate": "${sample_rate}"}},
            "optim": {
                "optimizer": "dadam",
                "lr": 1,
                "ema": {"use": True, "decay": 0.99, "device": "${device}"},
            },
            "classifier_free_guidance": {"training_dropout": 0.3, "inference_coef": 3.0},
            "attribute_dropout": {},
            "fuser": {
                "cross_attention_pos_emb": False,
                "cross_attention_pos_emb_scale": 1,
                "sum": [],
                "prepend": [],
                "cross": ["description"],
                "input_interpolate": [],
            },
            "conditioners": {
                "description": {
                    "model": "t5",
                    "t5": {
                        "name": "t5-base",
                        "finetune": False,
                        "word_dropout": 0.3,
                        "normalize_text": False,
                    },
                }
            },
            "sample_rate": 32000,
            "channels": 1,
            "compression_model_checkpoint": "//pretrained/facebook/encodec_32khz",
            "compression_model_n_q": None,
            "interleave_stereo_codebooks": {"use": False, "per_timestep": False},
            "lm_model": "transformer_lm",
            "codebooks_pattern": {
                "modeling": "delay",
                "delay": {"delays": list(range(CODEBOOKS)), "flatten_first": 0, "empty_initial": 0},
            },
            "transformer_lm": {
                "dim": DIM,
                "num_heads": HEADS,
                "num_layers": LAYERS,
                "hidden_scale": FEED_FORWARD // DIM,
                "n_q": CODEBOOKS,
                "card": CARDINALITY,
                "dropout": 0.0,
                "emb_lr": None,
                "activation": "gelu",
                "norm_first": True,
                "bias_ff": False,
                "bias_attn": False,
                "bias_proj": False,
                "past_context": None,
                "causal": True,
                "custom": False,
                "memory_efficient": True,
                "attention_as_float32": False,
                "layer_scale": None,
                "positional_embedding": "sin",
                "xpos": False,
                "checkpointing": "none",
                "cross_attention": False,
                "qk_layer_norm": False,
                "qk_layer_norm_cross": False,
                "attention_dropout": None,
                "kv_repeat": 1,
                "two_step_cfg": False,
            },
        }
    )


def _codec_config() -> str:
    """`xp.cfg` of the codec, interpolations unresolved."""
    return _yaml(
        {
            "device": "cuda",
            "dtype": "float32",
            "seed": SEED,
            "solver": "compression",
            "dataset": {"batch_size": 64, "segment_duration": 1},
            "generate": {"audio": {"format": "wav", "strategy": "clip", "sample_rate": "${sample_rate}"}},
            "optim": {"optimizer": "adam", "lr": 0.0003, "ema": {"use": True, "device": "${device}"}},
            "sample_rate": 32000,
            "channels": 1,
            "compression_model": "encodec",
            "encodec": {
                "autoencoder": "seanet",
                "quantizer": "rvq",
                "sample_rate": "${sample_rate}",
                "channels": "${channels}",
                "causal": False,
                "renormalize": False,
            },
            "seanet": {
                "dimension": LATENT,
                "channels": "${channels}",
                "causal": "${encodec.causal}",
                "n_filters": FILTERS,
                "n_residual_layers": 1,
                "ratios": list(RATIOS),
                "activation": "ELU",
                "activation_params": {"alpha": 1.0},
                "norm": "weight_norm",
                "norm_params": {},
                "kernel_size": 7,
                "residual_kernel_size": 3,
                "last_kernel_size": 7,
                "dilation_base": 2,
                "pad_mode": "constant",
                "true_skip": True,
                "compress": 2,
                "lstm": 2,
                "disable_norm_outer_blocks": 0,
                "decoder": {
                    "trim_right_ratio": 1.0,
                    "final_activation": None,
                    "final_activation_params": None,
                },
                "encoder": {},
            },
            "rvq": {
                "n_q": CODEBOOKS,
                "q_dropout": False,
                "bins": CARDINALITY,
                "decay": 0.99,
                "kmeans_init": True,
                "kmeans_iters": 50,
                "threshold_ema_dead_code": 2,
                "orthogonal_reg_weight": 0.0,
                "orthogonal_reg_active_codes_only": False,
            },
        }
    )


def _yaml(config: dict[str, object]) -> str:
    return yaml.safe_dump(config, sort_keys=False)
