"""EnCodec from audiocraft's exports: `compression_state_dict.bin`, its `xp.cfg` and `best_state`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from handler.compression.conv import PAD_MODES
from handler.compression.encodec import EncodecConfig, EncodecModel
from handler.compression.seanet import NORMS, SEANetConfig, make_activation
from handler.compression.state import load_weights
from handler.errors import CheckpointError
from handler.section import Section

# What `rvq` may hold: the shape of the codebooks, and how they were trained.
_RVQ_KEYS = frozenset(
    {
        "n_q",
        "bins",
        "q_dropout",
        "decay",
        "kmeans_init",
        "kmeans_iters",
        "threshold_ema_dead_code",
        "orthogonal_reg_weight",
        "orthogonal_reg_active_codes_only",
        "orthogonal_reg_max_codes",
    }
)


def load_encodec(config: Mapping[str, Any], state: Mapping[str, Tensor], source: str) -> EncodecModel:
    """Rebuild an exported EnCodec.

    Args:
        config: `xp.cfg`, its interpolations resolved on access.
        state: `best_state`.
        source: the file, for messages.

    Raises:
        CheckpointError: the configuration names what can't be honoured, or the weights don't fit it.
    """
    model = encodec_from_config(config, source)
    load_weights(model, state, source, _file_key)
    return model


def encodec_from_config(config: Mapping[str, Any], source: str = "xp.cfg") -> EncodecModel:
    """The EnCodec that `xp.cfg` describes, its parameters on the meta device.

    Reads `compression_model`, `encodec.*`, `seanet.*`, `rvq.*`, `sample_rate` and `channels`; what concerns
    training only is left alone.

    Raises:
        CheckpointError: as `load_encodec`.
    """
    return read_config(config, source).build()


def read_config(config: Mapping[str, Any], source: str = "xp.cfg") -> EncodecConfig:
    """The part of `xp.cfg` that makes the network. Raises as `load_encodec`."""
    root = Section(source, (("", config),))
    root.choice("compression_model", "absent", ["encodec"])
    encodec = Section(source, (("encodec", root.table("encodec")), ("", config)))
    encodec.choice("autoencoder", "seanet", ["seanet"])
    encodec.choice("quantizer", "rvq", ["rvq"])
    encoder = _seanet(root.part("seanet", "encoder"))
    decoder = _seanet(root.part("seanet", "decoder"))
    for name in ("channels", "dimension", "hop_length"):
        if getattr(encoder, name) != getattr(decoder, name):
            raise CheckpointError(
                f"{source}: seanet.encoder and seanet.decoder disagree on {name}, "
                f"{getattr(encoder, name)} and {getattr(decoder, name)}; they must be the same"
            )
    if encodec.integer("channels", encoder.channels) != encoder.channels:
        raise encodec.error("channels", f"must be seanet.channels, {encoder.channels}")
    rvq = root.part("rvq")
    rvq.log_unknown(_RVQ_KEYS)
    sample_rate = encodec.integer("sample_rate", 0, at_least=encoder.hop_length)
    return EncodecConfig(
        encoder=encoder,
        decoder=decoder,
        codebooks=rvq.integer("n_q", 8),
        bins=rvq.integer("bins", 1024),
        sample_rate=sample_rate,
        frame_rate=float(sample_rate // encoder.hop_length),
        renormalize=encodec.flag("renormalize", False),
    )


def _seanet(section: Section) -> SEANetConfig:
    default = SEANetConfig()
    config = SEANetConfig(
        channels=section.integer("channels", default.channels),
        dimension=section.integer("dimension", default.dimension),
        n_filters=section.integer("n_filters", default.n_filters),
        n_residual_layers=section.integer("n_residual_layers", default.n_residual_layers, at_least=0),
        ratios=section.integers("ratios", default.ratios),
        activation=section.get("activation", default.activation),
        activation_params=section.get("activation_params", default.activation_params) or {},
        final_activation=section.get("final_activation"),
        final_activation_params=section.table("final_activation_params"),
        norm=section.choice("norm", default.norm, NORMS),
        norm_params=section.table("norm_params"),
        kernel_size=section.integer("kernel_size", default.kernel_size),
        last_kernel_size=section.integer("last_kernel_size", default.last_kernel_size),
        residual_kernel_size=section.integer("residual_kernel_size", default.residual_kernel_size),
        dilation_base=section.integer("dilation_base", default.dilation_base),
        causal=section.flag("causal", default.causal),
        pad_mode=section.choice("pad_mode", default.pad_mode, PAD_MODES),
        true_skip=section.flag("true_skip", default.true_skip),
        compress=section.integer("compress", default.compress),
        lstm=section.integer("lstm", default.lstm, at_least=0),
        disable_norm_outer_blocks=section.integer("disable_norm_outer_blocks", 0, at_least=0),
        trim_right_ratio=section.number("trim_right_ratio", default.trim_right_ratio, 0.0, 1.0),
    )
    section.log_unknown({*SEANetConfig.__dataclass_fields__, "encoder", "decoder"})
    if config.disable_norm_outer_blocks > config.n_blocks:
        raise section.error("disable_norm_outer_blocks", f"there are only {config.n_blocks} blocks")
    _check_modules(section, config)
    return config


def _check_modules(section: Section, config: SEANetConfig) -> None:
    """Raise a CheckpointError for names and arguments that torch itself doesn't take."""
    final = config.final_activation
    tries = {
        "activation": lambda: config.act(),
        "final_activation": lambda: final is None or make_activation(final, config.final_activation_params),
        "norm_params": lambda: config.conv(config.n_blocks, 1, 1, 1),
    }
    for key, build in tries.items():
        try:
            build()
        except (AttributeError, TypeError, ValueError) as error:
            raise section.error(key, f"torch refuses it ({error})") from error


def _file_key(name: str) -> str:
    """A parameter's key in the file: the modules are named alike, but for the codebooks."""
    stem, _, index = name.rpartition(".")
    return f"quantizer.vq.layers.{index}._codebook.embed" if stem == "quantizer.codebooks" else name
