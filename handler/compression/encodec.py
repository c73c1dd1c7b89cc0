"""EnCodec (arXiv:2210.13438) as a compression model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from handler.compression.base import CompressionModel
from handler.compression.quantizer import ResidualVectorQuantizer
from handler.compression.seanet import SEANetConfig, SEANetDecoder, SEANetEncoder
from handler.compression.stages import decode_in_chunks


@dataclass(frozen=True, slots=True)
class EncodecConfig:
    """An EnCodec.

    Attributes:
        encoder, decoder: the networks; both have the same channels, dimension and hop length.
        codebooks: how many there are.
        bins: codes per codebook.
        sample_rate: in Hz.
        frame_rate: frames per second, which audiocraft's exports round down to an integer.
        renormalize: divide the input by its volume, and multiply the output by it again.
    """

    encoder: SEANetConfig
    decoder: SEANetConfig
    codebooks: int
    bins: int
    sample_rate: int
    frame_rate: float
    renormalize: bool = False

    def build(self) -> EncodecModel:
        """The model without its weights: its parameters are on the meta device."""
        with torch.device("meta"):
            return EncodecModel(self)


class EncodecModel(CompressionModel):
    """Encoder, residual vector quantizer, decoder; float32, for inference only."""

    def __init__(self, config: EncodecConfig) -> None:
        super().__init__()
        self.sample_rate = config.sample_rate
        self.channels = config.encoder.channels
        self.frame_rate = config.frame_rate
        self.hop_length = config.encoder.hop_length
        self.cardinality = config.bins
        self.total_codebooks = self.num_codebooks = config.codebooks
        self.renormalize = config.renormalize
        self.encoder = SEANetEncoder(config.encoder)
        self.decoder = SEANetDecoder(config.decoder)
        self.quantizer = ResidualVectorQuantizer(config.encoder.dimension, config.codebooks, config.bins)
        self.requires_grad_(False).eval()

    def encode(self, wav: Tensor) -> tuple[Tensor, Tensor | None]:
        self.check_wav(wav)
        scale = None
        if self.renormalize:
            volume = wav.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + 1e-8  # [B, 1, 1]
            wav = wav / volume
            scale = volume.squeeze(2)  # [B, 1]
        return self.quantizer.encode(self.encoder(wav), self.num_codebooks), scale

    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        if scale is not None and not self.renormalize:
            raise ValueError("this compression model doesn't normalise its input, so decode takes no scale")
        if scale is not None and scale.shape != (codes.shape[0], 1):
            raise ValueError(f"scale must have shape [{codes.shape[0]}, 1], got {list(scale.shape)}")
        latent = self.decode_latent(codes)
        wav = decode_in_chunks(self.decoder, latent) if latent.device.type == "cpu" else self.decoder(latent)
        return wav if scale is None else wav * scale[:, :, None]

    def decode_latent(self, codes: Tensor) -> Tensor:
        """Codes `[B, K, frames]` -> what the decoder takes, float32 `[B, dimension, frames]`.

        Raises:
            ValueError: as `decode`.
        """
        self.check_codes(codes)
        return self.quantizer.decode(codes.long())
