"""From an `xp.cfg` to modules, honouring what it says."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from handler.checkpoint import COMPRESSION_FILE, Checkpoint, Config, load_parameters, read_checkpoint
from handler.compression import CompressionModel, InterleavedStereo, load_encodec
from handler.compression.pretrained import DAC, DEBUG, load_pretrained
from handler.compression.state import TRAINING_STATISTICS
from handler.conditioners.base import Conditioner
from handler.conditioners.fuser import METHODS, Fuser
from handler.conditioners.lut import LUTConditioner, get_words, natural_words
from handler.conditioners.provider import ConditioningProvider
from handler.conditioners.style import build_style
from handler.conditioners.t5 import T5Conditioner
from handler.errors import CheckpointError
from handler.finite import require_finite
from handler.lm.embedding import Rotary
from handler.lm.model import LanguageModel
from handler.lm.patterns import PatternProvider, get_pattern_provider
from handler.lm.transformer import TransformerConfig
from handler.section import Section

FindAuxiliary = Callable[[str], Path]
"""From the name of an auxiliary model, as configs spell it (`t5-base`), to its folder."""

_PROVIDER = "condition_provider."

_OPTIONAL_BUFFERS = frozenset({"window", "num_batches_tracked", *TRAINING_STATISTICS})
"""Buffers of conditioners that follow from the config, or that only training reads; a file may lack them."""

# Keys of transformer_lm that only matter to training, or choose between implementations of the same numbers.
_WITHOUT_EFFECT = frozenset(
    {
        "dropout",
        "attention_dropout",
        "emb_lr",
        "lr",
        "weight_decay",
        "checkpointing",
        "weight_init",
        "depthwise_init",
        "zero_bias_init",
        "memory_efficient",
        "custom",
        "q_modeling",
        "two_step_cfg",
    }
)


def build_language_model(checkpoint: Checkpoint) -> LanguageModel:
    """The language model of `transformer_lm`, its parameters still in the file; `finalize` reads them.

    Raises:
        CheckpointError: for a key that cannot be honoured, and for parameters that do not fit the config.
    """
    config = checkpoint.config
    section = _section(config, "transformer_lm")
    num_codebooks, card = section.integer("n_q", 8), section.integer("card", 1024)
    transformer = _transformer_config(config, section)
    patterns = _pattern_provider(config, num_codebooks)
    with torch.device("meta"):
        lm = LanguageModel(transformer, num_codebooks, card, section.flag("bias_proj", True), patterns)
    state = {}
    for name, tensor in checkpoint.state.items():
        if name.startswith(_PROVIDER) or ".self_attn.rope." in name:
            continue  # each layer repeats the rotary frequencies of `transformer.rope`
        # Models trained with torch's own attention name its parameters one level deeper.
        state[name.replace(".mha.", ".")] = tensor
    if lm.transformer.rope is not None:
        _complete_rope(state, checkpoint, transformer)
    load_parameters(lm, state, checkpoint.source)
    return lm


def _complete_rope(state: dict[str, Tensor], checkpoint: Checkpoint, config: TransformerConfig) -> None:
    """Adds the rotary buffers that a file lacks: a layer's copy, else those of the config, rounded as the file is."""
    dtype = checkpoint.state["emb.0.weight"].dtype if "emb.0.weight" in checkpoint.state else torch.float32
    for name, value in Rotary.computed(config.head_dim, config.max_period, config.xpos).items():
        copy = checkpoint.state.get(f"transformer.layers.0.self_attn.rope.{name}")
        state.setdefault(f"transformer.rope.{name}", value.to(dtype) if copy is None else copy)


def check_parameter(checkpoint: Checkpoint, dtype: torch.dtype, name: str, parameter: Tensor) -> None:
    """Raises CheckpointError for a parameter of the language model that is not finite, in the file or in the dtype that
    the model computes in. The name is the model's own; the message has the file's."""
    key = name if name in checkpoint.state else re.sub(r"(self_attn|cross_attention)\.", r"\1.mha.", name)
    in_float32 = ".rope." in name
    require_finite(parameter, key, checkpoint.source, torch.float32 if in_float32 else dtype)


def build_fuser(config: Config) -> Fuser:
    """The fuser of `fuser`."""
    section = _section(config, "fuser")
    section.log_unknown({*METHODS, "cross_attention_pos_emb", "cross_attention_pos_emb_scale"})
    scale = section.number("cross_attention_pos_emb_scale", 1.0, -1e6, 1e6)
    methods = {method: section.get(method) or [] for method in METHODS}
    return Fuser(methods, _output_dim(config), scale if section.flag("cross_attention_pos_emb", False) else None)


def build_conditioners(checkpoint: Checkpoint, find_auxiliary: FindAuxiliary) -> ConditioningProvider:
    """The conditioners of `conditioners`, with their parameters, in float32.

    Args:
        checkpoint: of the language model, which holds the conditioners' own parameters.
        find_auxiliary: finds the models they build on.

    Raises:
        CheckpointError: for a kind of conditioner nobody knows, a missing auxiliary model, or parameters that do not
            fit the config.
    """
    config = checkpoint.config
    section = config.section("conditioners")
    state = {n.removeprefix(_PROVIDER): t for n, t in checkpoint.state.items() if n.startswith(_PROVIDER)}
    for name, tensor in state.items():
        require_finite(tensor, _PROVIDER + name, checkpoint.source, torch.float32)
    conditioners: dict[str, Conditioner] = {}
    for name in section:
        if name == "args":
            continue  # dropout while training
        kind = section.section(name).get("model")
        if kind not in _CONDITIONERS:
            raise CheckpointError(
                f"{checkpoint.source}: {section.key(name)}.model of its xp.cfg is {kind!r}; "
                f"it must be one of {', '.join(_CONDITIONERS)}."
            )
        own = {
            n.removeprefix(f"conditioners.{name}."): t
            for n, t in state.items()
            if n.startswith(f"conditioners.{name}.")
        }
        conditioners[name] = _CONDITIONERS[kind](config, section.section(name).section(kind), own, find_auxiliary)
    provider = ConditioningProvider(conditioners)
    auxiliary = tuple(f"conditioners.{name}.t5." for name in conditioners)
    computed = {n: b for n, b in provider.named_buffers() if n.rpartition(".")[2] in _OPTIONAL_BUFFERS}
    state = computed | {n: t.float() for n, t in state.items() if not n.startswith(auxiliary)}
    load_parameters(provider, state, checkpoint.source, _PROVIDER)
    return provider.eval().requires_grad_(False)


def build_compression_model(path: Path, lm_config: Config, find_auxiliary: FindAuxiliary) -> CompressionModel:
    """The compression model of a file, as the language model's config asks for it.

    Raises:
        CheckpointError: if the file cannot be used, or the model it points to cannot be found.
    """
    model = _open_compression(path, find_auxiliary)
    num_codebooks = lm_config.get("compression_model_n_q")
    if num_codebooks is not None:
        try:
            model.set_num_codebooks(num_codebooks)
        except ValueError as error:
            raise CheckpointError(f"{lm_config.source}: compression_model_n_q of its xp.cfg: {error}") from error
    stereo = lm_config.section("interleave_stereo_codebooks")
    if stereo.get("use"):
        model = InterleavedStereo(model, per_timestep=bool(stereo.get("per_timestep", False)))
    return model.eval().requires_grad_(False)


def _build_t5(
    config: Config, section: Config, state: Mapping[str, Tensor], find_auxiliary: FindAuxiliary
) -> Conditioner:
    name = section.get("name")
    if not isinstance(name, str):
        raise CheckpointError(f"{section.source}: {section.key('name')} of its xp.cfg must name a T5, not {name!r}.")
    normalize: Callable[[str], str] | None = None
    if section.get("normalize_text"):
        words = natural_words(section.key("normalize_text"))

        def normalize(text: str) -> str:
            return " ".join(words(text))

    finetuned = {n.removeprefix("t5."): t.float() for n, t in state.items() if n.startswith("t5.")}
    if section.get("finetune") and not finetuned:
        raise CheckpointError(f"{section.source}: {section.key('finetune')} is true, but the file holds no T5.")
    return T5Conditioner(find_auxiliary(name), _output_dim(config), normalize, finetuned or None)


def _build_lut(
    config: Config, section: Config, state: Mapping[str, Tensor], find_auxiliary: FindAuxiliary
) -> Conditioner:
    words = get_words(str(section.get("tokenizer")), section.key("tokenizer"))
    table = Section(section.source, ((section.path, section),))
    return LUTConditioner(table.integer("n_bins", 0), table.integer("dim", 0), _output_dim(config), words)


def _build_chroma(
    config: Config, section: Config, state: Mapping[str, Tensor], find_auxiliary: FindAuxiliary
) -> Conditioner:
    # Imported here: demucs takes a while to import, and only melody models need it.
    from handler.conditioners.chroma import build_chroma

    return build_chroma(config, section, state, find_auxiliary)


_CONDITIONERS: dict[str, Callable[[Config, Config, Mapping[str, Tensor], FindAuxiliary], Conditioner]] = {
    "t5": _build_t5,
    "lut": _build_lut,
    "chroma_stem": _build_chroma,
    "style": build_style,
}


def _open_compression(path: Path, find_auxiliary: FindAuxiliary, followed: tuple[Path, ...] = ()) -> CompressionModel:
    checkpoint = read_checkpoint(path)
    if isinstance(checkpoint, Checkpoint):
        return load_encodec(checkpoint.config, checkpoint.state, checkpoint.source)
    if checkpoint.name not in (*DAC, DEBUG) and (target := checkpoint.local_file):
        return _follow(target, path, checkpoint.name, find_auxiliary, followed)
    if checkpoint.name not in (*DAC, DEBUG):
        own = find_auxiliary(checkpoint.name) / COMPRESSION_FILE
        if own.is_file():  # audiocraft's own layout instead of transformers'
            return _follow(own, path, checkpoint.name, find_auxiliary, followed)
    return load_pretrained(checkpoint.name, find_auxiliary)


def _follow(
    target: Path, path: Path, name: str, find_auxiliary: FindAuxiliary, followed: tuple[Path, ...]
) -> CompressionModel:
    if target in (path, *followed):
        raise CheckpointError(f"{path} points to {name!r}, which points back to it.")
    return _open_compression(target, find_auxiliary, (*followed, path))


def _transformer_config(config: Config, section: Section) -> TransformerConfig:
    _section(config, "").choice("lm_model", "transformer_lm", ["transformer_lm"])
    dim, num_heads = section.integer("dim", 128), section.integer("num_heads", 8)
    kv_repeat = section.integer("kv_repeat", 1)
    if section.get("norm", "layer_norm") != "layer_norm":
        raise section.error("norm", "must be layer_norm")
    if section.get("causal", True) is not True:
        raise section.error("causal", "must be true: codes are generated one step after the other")
    if dim % num_heads or dim % 2:
        raise section.error("dim", f"must be even and a multiple of transformer_lm.num_heads, {num_heads}")
    if num_heads % kv_repeat:
        raise section.error("kv_repeat", f"must divide transformer_lm.num_heads, {num_heads}")
    past_context = section.get("past_context")
    result = TransformerConfig(
        dim=dim,
        num_heads=num_heads,
        num_layers=section.integer("num_layers", 0),
        hidden_dim=int(section.number("hidden_scale", 4, 0, 1000) * dim),
        norm_first=section.flag("norm_first", False),
        bias_attn=section.flag("bias_attn", True),
        bias_ff=section.flag("bias_ff", True),
        activation=section.choice("activation", "relu", ["gelu", "relu"]),
        positional_embedding=section.choice("positional_embedding", "sin", ["sin", "rope", "sin_rope"]),
        max_period=section.number("max_period", 10_000, 1, 1e12),
        positional_scale=section.number("positional_scale", 1.0, -1e6, 1e6),
        xpos=section.flag("xpos", False),
        qk_layer_norm=section.flag("qk_layer_norm", False),
        qk_layer_norm_cross=section.flag("qk_layer_norm_cross", False),
        layer_scale=section.get("layer_scale") is not None,
        kv_repeat=kv_repeat,
        past_context=None if past_context is None else section.integer("past_context", 0),
        attention_as_float32=section.flag("attention_as_float32", False),
        cross_attention=bool(config.section("fuser").get("cross")) or section.flag("cross_attention", False),
    )
    if kv_repeat > 1 and (result.cross_attention or result.qk_layer_norm):
        raise section.error("kv_repeat", "goes neither with cross-attention nor with qk_layer_norm")
    section.log_unknown(
        {*TransformerConfig.__dataclass_fields__, "hidden_scale", "n_q", "card", "bias_proj", "norm", "causal"}
        | _WITHOUT_EFFECT
    )
    return result


def _pattern_provider(config: Config, num_codebooks: int) -> PatternProvider:
    section = config.section("codebooks_pattern")
    name = section.get("modeling")
    if name is None:
        # The first models name the pattern in the language model, and delay by one step a codebook.
        return get_pattern_provider(str(config.section("transformer_lm").get("q_modeling", "delay")), num_codebooks, {})
    return get_pattern_provider(str(name), num_codebooks, section.section(name))


def _output_dim(config: Config) -> int:
    return _section(config, "transformer_lm").integer("dim", 128)


def _section(config: Config, name: str) -> Section:
    """Typed reads of a part of the config; the whole of it under no name."""
    return Section(config.source, ((config.key(name) if name else "", config.section(name) if name else config),))
