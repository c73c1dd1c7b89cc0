"""The peer: MusicGen of transformers, with the same weights."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import ClassifierFreeGuidanceLogitsProcessor, LogitsProcessorList, TopKLogitsWarper
from transformers.utils import logging as transformers_logging

from handler.checkpoint import COMPRESSION_FILE, LM_FILE, Checkpoint, read_checkpoint
from handler.lm.conditions import FusedConditions
from handler.params import GenerationParams

PROVIDER = "condition_provider.conditioners"


def peer_folder(checkpoint: Path) -> Path:
    """The checkpoint as transformers saves it (float32, safetensors), written at the first call."""
    folder = checkpoint / "transformers"
    if not folder.is_dir():
        staged = checkpoint / f".transformers-{os.getpid()}"
        shutil.rmtree(staged, ignore_errors=True)
        _write(staged, checkpoint)
        staged.rename(folder)
    return folder


def load(folder: Path, dtype: str, device: str) -> Any:
    """A `MusicgenForConditionalGeneration`, or its sister for melody models.

    Raises:
        RuntimeError: if the folder lacks a parameter, which transformers would draw at random.
    """
    _quiet()
    config = transformers.AutoConfig.from_pretrained(folder)
    melody = config.model_type == "musicgen_melody"
    name = "MusicgenMelodyForConditionalGeneration" if melody else "MusicgenForConditionalGeneration"
    model, info = getattr(transformers, name).from_pretrained(
        folder, dtype=getattr(torch, dtype), local_files_only=True, output_loading_info=True
    )
    if info["missing_keys"] or info["unexpected_keys"]:
        raise RuntimeError(f"{folder}: {info['missing_keys']} missing, {info['unexpected_keys']} unexpected")
    return model.to(device).eval()


class PeerDecoder:
    """One request with guidance, step by step, as `generate` does it but without its bookkeeping between steps.

    Args:
        model: what `load` gave; only its decoder is kept.
    """

    def __init__(self, model: Any) -> None:
        self.decoder = model.decoder
        config = self.decoder.config
        self.codebooks, self.special_token = config.num_codebooks, config.pad_token_id
        params = GenerationParams()
        self._processors: Any = LogitsProcessorList(
            [ClassifierFreeGuidanceLogitsProcessor(params.cfg_coef), TopKLogitsWarper(params.top_k)]
        )
        self._inputs: dict[str, Any] = {}
        self._tokens: Tensor

    def begin(self, conditions: FusedConditions) -> None:
        """Starts over under the conditions of two rows, and takes the first step."""
        self._inputs = self.inputs(conditions) | {"past_key_values": None}
        self._tokens = torch.full((self.codebooks, 1), self.special_token, device=self.decoder.device)
        self.step()
        if conditions.cross is None:
            self._inputs["encoder_hidden_states"] = None  # they stand before the codes, and now in the cache

    def step(self) -> None:
        """One decode step: forward pass, guidance, top-k, draw."""
        out = self.decoder(input_ids=self._tokens.repeat(2, 1), use_cache=True, **self._inputs)
        self._inputs["past_key_values"] = out.past_key_values
        scores = self._processors(self._tokens, out.logits[:, -1].float())  # [K, card]
        self._tokens = scores.softmax(dim=-1).multinomial(1)  # [K, 1]

    def logits(self, sequence: Tensor, conditions: FusedConditions) -> Tensor:
        """Of a whole sequence `[K, S]`, float32 `[R, S, K, card]`."""
        tokens = sequence.repeat(conditions.rows, 1).to(self.decoder.device)  # [R * K, S]
        out = self.decoder(input_ids=tokens, **self.inputs(conditions)).logits  # [R * K, P + S, card]
        return out[:, -sequence.shape[1] :].float().unflatten(0, (conditions.rows, -1)).transpose(1, 2)

    def conditions(self, text: Tensor) -> FusedConditions:
        """Of a request with guidance, from its projected text `[1, L, dim]`; the melody is left out."""
        if self.decoder.config.model_type == "musicgen_melody_decoder":
            return FusedConditions(2, torch.cat([text, torch.zeros_like(text)]))
        return FusedConditions(2, text.new_zeros(2, 0, text.shape[-1]), text)

    def inputs(self, conditions: FusedConditions) -> dict[str, Any]:
        """The conditions as the decoder takes them; null rows are zeros here."""
        if conditions.cross is None:
            hidden = conditions.prefix  # [R, P, dim]
        else:
            null_rows = conditions.rows - len(conditions.cross)
            hidden = torch.cat([conditions.cross, conditions.cross.new_zeros(null_rows, *conditions.cross.shape[1:])])
        return {"encoder_hidden_states": hidden.to(self.decoder.device, self.decoder.dtype)}


def make_clip(model: Any, folder: Path, text: str, seconds: float) -> Tensor:
    """One clip of a text with guidance by `generate`, from the text to the audio `[channels, T]`.

    Args:
        model: what `load` gave.
        folder: of `peer_folder`.
    """
    tokens = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)(text, return_tensors="pt")
    params, config = GenerationParams(), model.decoder.config
    steps = round(seconds * model.audio_encoder.config.frame_rate) + config.num_codebooks - 1  # of delayed codebooks
    wav = model.generate(
        input_ids=tokens.input_ids.to(model.device),
        attention_mask=tokens.attention_mask.to(model.device),
        do_sample=True,
        guidance_scale=params.cfg_coef,
        top_k=params.top_k,
        min_new_tokens=steps,
        max_new_tokens=steps,
        decoder_start_token_id=config.pad_token_id,
        pad_token_id=config.pad_token_id,
        bos_token_id=config.pad_token_id,
    )
    return wav[0]


def _quiet() -> None:
    """Its bars would cross ours, and it warns of MusicGen's own special token."""
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _write(folder: Path, checkpoint: Path) -> None:
    _quiet()
    lm, codec = _read(checkpoint / LM_FILE), _read(checkpoint / COMPRESSION_FILE)
    text = checkpoint / "hub" / "t5-base"
    melody = f"{PROVIDER}.self_wav.output_proj.weight" in lm.state
    _config(lm, codec, text, melody).save_pretrained(folder)
    state = {f"text_encoder.{name}": value for name, value in load_file(text / "model.safetensors").items()}
    state |= {f"audio_encoder.{name}": value for name, value in _codec_state(codec.state).items()}
    state |= _lm_state(lm.state)
    for tokenizer in text.glob("tokenizer*"):
        shutil.copy(tokenizer, folder)
    save_file(
        {name: value.float().clone() for name, value in state.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def _read(path: Path) -> Checkpoint:
    checkpoint = read_checkpoint(path)
    assert isinstance(checkpoint, Checkpoint)
    return checkpoint


def _config(lm: Checkpoint, codec: Checkpoint, text: Path, melody: bool) -> Any:
    transformer, seanet = lm.config.section("transformer_lm"), codec.config.section("seanet")
    bins, sample_rate = codec.config.section("rvq")["bins"], codec.config["sample_rate"]
    ratios = list(seanet["ratios"])
    sizes = {
        "vocab_size": transformer["card"],
        "hidden_size": transformer["dim"],
        "num_attention_heads": transformer["num_heads"],
        "num_hidden_layers": transformer["num_layers"],
        "ffn_dim": transformer["hidden_scale"] * transformer["dim"],
        "num_codebooks": transformer["n_q"],
        "pad_token_id": transformer["card"],
        "bos_token_id": transformer["card"],
    }
    audio = transformers.EncodecConfig(
        sampling_rate=sample_rate,
        num_filters=seanet["n_filters"],
        upsampling_ratios=ratios,
        codebook_size=bins,
        target_bandwidths=[2.2],  # kbit/s: four codebooks of 11 bits, 50 times a second
        pad_mode=seanet["pad_mode"],
        use_causal_conv=False,
        use_conv_shortcut=False,
    )
    parts: dict[str, Any] = {
        "text_encoder": transformers.T5Config.from_pretrained(text).to_dict(),
        "audio_encoder": audio.to_dict(),
    }
    if melody:
        return transformers.MusicgenMelodyConfig(
            **parts, decoder=transformers.MusicgenMelodyDecoderConfig(**sizes).to_dict()
        )
    return transformers.MusicgenConfig(**parts, decoder=transformers.MusicgenDecoderConfig(**sizes).to_dict())


_RENAMED = {
    "transformer.layers.": "decoder.model.decoder.layers.",
    "out_norm.": "decoder.model.decoder.layer_norm.",
    "emb.": "decoder.model.decoder.embed_tokens.",
    "linears.": "decoder.lm_heads.",
    f"{PROVIDER}.description.output_proj.": "enc_to_dec_proj.",
    f"{PROVIDER}.self_wav.output_proj.": "audio_enc_to_dec_proj.",
    ".cross_attention.": ".encoder_attn.",
    ".norm1.": ".self_attn_layer_norm.",
    ".norm_cross.": ".encoder_attn_layer_norm.",
    ".norm2.": ".final_layer_norm.",
    ".linear1.": ".fc1.",
    ".linear2.": ".fc2.",
}


def _lm_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The language model's parameters under transformers' names; q, k and v are apart there."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if name.endswith("spec.window"):
            continue  # chroma is made by the feature extractor there
        for ours, theirs in _RENAMED.items():
            if name.startswith(ours) or (ours.startswith(".") and ours in name):
                name = name.replace(ours, theirs)
        if name.endswith("in_proj_weight"):
            stem = name.removesuffix("in_proj_weight")
            renamed |= {f"{stem}{kind}_proj.weight": part for kind, part in zip("qkv", value.chunk(3), strict=True)}
        else:
            renamed[name] = value
    return renamed


def _codec_state(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """EnCodec's parameters under transformers' names."""
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        for ours, theirs in (
            (".model.", ".layers."),
            (".conv.conv.", ".conv."),
            (".convtr.convtr.", ".conv."),
            (".weight_g", ".parametrizations.weight.original0"),
            (".weight_v", ".parametrizations.weight.original1"),
            ("quantizer.vq.", "quantizer."),
            ("._codebook.", ".codebook."),
        ):
            name = name.replace(ours, theirs)
        renamed[name] = value
    return renamed
