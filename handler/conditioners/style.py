"""Style: a bottleneck of features of a short excerpt (MusicGen-Style, arXiv:2407.12563)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from handler.audio import convert_audio
from handler.checkpoint import Config
from handler.compression.pretrained import load_pretrained
from handler.conditioners.base import WavConditioner, WavInput
from handler.conditioners.excerpt import excerpt_of
from handler.conditioners.fuser import Condition
from handler.conditioners.mert import load_mert
from handler.conditioners.style_encoder import (
    EncodecFeatures,
    MertFeatures,
    StyleFeatures,
    StyleQuantizer,
    StyleTransformer,
)
from handler.errors import RequestError
from handler.section import Section

MERT = "m-a-p/MERT-v1-95M"
"""The auxiliary model of `model_name: mert`."""

_PRETRAINED = "//pretrained/"  # how configs mark a model of the hub

# transformer_scale: dim, heads, layers
_SCALES = {"none": (512, 0, 0), "xsmall": (256, 8, 4), "default": (512, 8, 8), "large": (1024, 16, 24)}

_KEYS = {
    *("model_name", "transformer_scale", "sample_rate", "encodec_checkpoint", "encodec_n_q", "length", "ds_factor"),
    *("n_q_out", "eval_q", "bins", "batch_norm", "use_middle_of_segment"),
    # These matter to training alone.
    *("q_dropout", "varying_lengths", "compute_mask", "num_codebooks_lm", "ds_rate_compression"),
    "rvq_threshold_ema_dead_code",
}


@dataclass(frozen=True, slots=True)
class StyleParams:
    """How an excerpt is taken in, by its names in requests and in the config.

    Attributes:
        eval_q: codebooks of the bottleneck; fewer keep less of the style.
        excerpt_length: seconds (`length` in the config).
        ds_factor: one vector of so many is kept.
        encodec_n_q: codebooks of the compression model, where that gives the features.
    """

    eval_q: int
    excerpt_length: float
    ds_factor: int
    encodec_n_q: int


class StyleConditioner(WavConditioner):
    """Features of an excerpt through a transformer, batch norm, a quantizer and downsampling (`conditioners.*.style`).

    The excerpt is the middle of the audio (`use_middle_of_segment`), or begins where the request's seed says. All its
    vectors count: the reference masks those beyond the end of the audio, and an excerpt never reaches that far.
    Computed in float32.

    Args:
        features: of the excerpt, `[B, L, dim]`.
        dim: of the features.
        num_heads, num_layers: of the transformer; without layers there is none.
        num_codebooks, bins: of the quantizer (`n_q_out`); without codebooks there is none.
        batch_norm: whether there is one.
        sample_rate: of the excerpt, in Hz.
        use_middle: take the middle of the audio.
        params: of the checkpoint.
        output_dim: the language model's dimension.
    """

    max_length = 512  # a shorter excerpt, or a larger ds_factor, for more than that

    def __init__(
        self,
        features: StyleFeatures,
        dim: int,
        num_heads: int,
        num_layers: int,
        num_codebooks: int,
        bins: int,
        batch_norm: bool,
        sample_rate: int,
        use_middle: bool,
        params: StyleParams,
        output_dim: int,
    ) -> None:
        super().__init__(dim, output_dim)
        self.embed = features
        self.transformer = StyleTransformer(dim, num_heads, num_layers) if num_layers else None
        self.batch_norm = nn.BatchNorm1d(dim, affine=False) if batch_norm else None
        self.rvq = StyleQuantizer(dim, num_codebooks, bins) if num_codebooks else None
        self.num_codebooks = num_codebooks
        self.sample_rate, self.use_middle, self.params = sample_rate, use_middle, params

    def forward(self, wav: WavInput | None) -> Condition:
        """The style of a piece of audio, on the CPU; None is the null condition of length 1.

        Raises:
            RequestError: as `excerpt`.
        """
        if wav is None:
            return self.null(1)
        excerpt, params = self.excerpt(wav)
        excerpt = excerpt.to(self.output_proj.weight.device)
        return Condition(self.encode(excerpt, params).float().cpu())

    def check(self, wav: WavInput) -> None:
        self.excerpt(wav)

    def excerpt(self, wav: WavInput) -> tuple[Tensor, StyleParams]:
        """What is looked at of a piece of audio, float32 `[1, T]` at `sample_rate`, and how.

        Raises:
            RequestError: if the request's params are out of bounds, or the audio is shorter than the excerpt.
        """
        params = self.params_with(wav.eval_q, wav.excerpt_length, wav.ds_factor, wav.encodec_n_q)
        audio = convert_audio(wav.wav[None], wav.sample_rate, self.sample_rate, 1)  # [1, whole T]
        excerpt = excerpt_of(audio, self._samples(params), self.use_middle, wav.seed)
        if excerpt is None:
            raise RequestError(
                "excerpt_length",
                f"an excerpt of {params.excerpt_length:g} s does not fit into audio of "
                f"{audio.shape[1] / self.sample_rate:g} s; send longer audio, or ask for a shorter excerpt",
            )
        return excerpt, params

    def encode(self, excerpts: Tensor, params: StyleParams) -> Tensor:
        """Excerpts float32 `[B, T]` at `sample_rate` -> the vectors of their style `[B, L, output_dim]`."""
        x = self.embed(excerpts, params.encodec_n_q)  # [B, L, dim]
        if self.transformer is not None:
            x = self.transformer(x)
        if self.batch_norm is not None:
            x = self.batch_norm(x.mT).mT
        if self.rvq is not None:
            x = self.rvq(x, params.eval_q)
        return self.output_proj(x[:, :: params.ds_factor])

    def null(self, length: int) -> Condition:
        return self._zeros(length)

    def params_with(
        self,
        eval_q: int | None = None,
        excerpt_length: float | None = None,
        ds_factor: int | None = None,
        encodec_n_q: int | None = None,
    ) -> StyleParams:
        """The checkpoint's params, but for those given.

        Raises:
            RequestError: for one out of bounds, or without meaning for this model.
        """
        own = self.params
        if eval_q is not None and not self.num_codebooks:
            raise RequestError("eval_q", "has no meaning for this model, whose style is not quantized; leave it out")
        if eval_q is not None and not 1 <= eval_q <= self.num_codebooks:
            raise RequestError("eval_q", f"must be 1 to this model's {self.num_codebooks}, not {eval_q}")
        if ds_factor is not None and ds_factor < 1:
            raise RequestError("ds_factor", f"must be 1 or more, not {ds_factor}")
        if encodec_n_q is not None and not isinstance(self.embed, EncodecFeatures):
            raise RequestError("encodec_n_q", "has no meaning for this model, whose features are MERT's; leave it out")
        if encodec_n_q is not None and not 1 <= encodec_n_q <= own.encodec_n_q:
            raise RequestError("encodec_n_q", f"must be 1 to this model's {own.encodec_n_q}, not {encodec_n_q}")
        if excerpt_length is not None and not math.isfinite(excerpt_length):
            raise RequestError("excerpt_length", f"must be a number of seconds, not {excerpt_length}")
        params = StyleParams(
            eval_q=own.eval_q if eval_q is None else eval_q,
            excerpt_length=own.excerpt_length if excerpt_length is None else excerpt_length,
            ds_factor=own.ds_factor if ds_factor is None else ds_factor,
            encodec_n_q=own.encodec_n_q if encodec_n_q is None else encodec_n_q,
        )
        if self._samples(params) < self.embed.min_samples:
            shortest = math.ceil(1000 * self.embed.min_samples / self.sample_rate) / 1000
            raise RequestError(
                "excerpt_length",
                f"must be at least {shortest:g} s, one frame of features, not {params.excerpt_length:g}",
            )
        return params

    def _samples(self, params: StyleParams) -> int:
        return int(params.excerpt_length * self.sample_rate)


def build_style(
    config: Config, section: Config, state: Mapping[str, Tensor], find_auxiliary: Callable[[str], Path]
) -> StyleConditioner:
    """The style conditioner of `conditioners.*.style`, its parameters still in the file.

    Args:
        config: the whole `xp.cfg`.
        section: the part at hand.
        state: the conditioner's parameters, not needed to build it.
        find_auxiliary: finds MERT or the compression model.

    Raises:
        CheckpointError: for a key that cannot be honoured, or a pretrained model that is missing or does not fit.
    """
    style = Section(config.source, ((section.path, section),))
    unknown = sorted(set(section) - _KEYS)
    if unknown:
        raise style.error(unknown[0], "is no key of a style conditioner")
    dim, num_heads, num_layers = _SCALES[style.choice("transformer_scale", "default", _SCALES)]
    sample_rate = style.integer("sample_rate", 0)
    num_codebooks = style.integer("n_q_out", 6, at_least=0)
    params = StyleParams(
        eval_q=style.integer("eval_q", 3),
        excerpt_length=style.number("length", 0.0, 1 / sample_rate, math.inf),
        ds_factor=style.integer("ds_factor", 15),
        encodec_n_q=style.integer("encodec_n_q", 4),
    )
    if num_codebooks and params.eval_q > num_codebooks:
        raise style.error("eval_q", f"must be at most n_q_out, {num_codebooks}")
    features: StyleFeatures
    if style.choice("model_name", "absent", ["mert", "encodec"]) == "mert":
        features = MertFeatures(load_mert(find_auxiliary(MERT)), sample_rate, dim)
    else:
        features = _encodec_features(style, sample_rate, params.encodec_n_q, dim, find_auxiliary)
    return StyleConditioner(
        features,
        dim,
        num_heads,
        num_layers,
        num_codebooks,
        style.integer("bins", 1024),
        style.flag("batch_norm", True),
        sample_rate,
        style.flag("use_middle_of_segment", False),
        params,
        Section(config.source, (("transformer_lm", config.section("transformer_lm")),)).integer("dim", 128),
    )


def _encodec_features(
    style: Section, sample_rate: int, num_codebooks: int, dim: int, find_auxiliary: Callable[[str], Path]
) -> EncodecFeatures:
    name = style.get("encodec_checkpoint")
    if not isinstance(name, str) or not name.startswith(_PRETRAINED):
        raise style.error(
            "encodec_checkpoint", f"must be {_PRETRAINED} and a model, as in {_PRETRAINED}facebook/encodec_32khz"
        )
    model = load_pretrained(name.removeprefix(_PRETRAINED), find_auxiliary)
    if (model.sample_rate, model.channels) != (sample_rate, 1):
        raise style.error(
            "encodec_checkpoint",
            f"must take mono audio at sample_rate, {sample_rate} Hz, "
            f"not {model.channels} channels at {model.sample_rate} Hz",
        )
    if num_codebooks > model.num_codebooks:
        raise style.error("encodec_n_q", f"must be at most the {model.num_codebooks} of {name}")
    return EncodecFeatures(model.eval().requires_grad_(False), num_codebooks, dim)
