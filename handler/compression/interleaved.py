"""Stereo out of a mono compression model: each channel is coded by itself (arXiv:2306.05284, section 2.1)."""

from __future__ import annotations

from torch import Tensor

from handler.compression.base import CompressionModel
from handler.errors import CheckpointError


class InterleavedStereo(CompressionModel):
    """Two channels through one mono model, their codes interleaved with the channel fastest.

    Over codebooks: K is doubled, L0 R0 L1 R1 ...; per timestep: frames and frame rate are doubled instead.
    All counts are those after interleaving. A scale has one column per channel, `[B, 2]`.

    Args:
        model: the mono model; `compression_model_n_q` counts its codebooks, so it is set there before.
        per_timestep: `interleave_stereo_codebooks.per_timestep` of the language model's `xp.cfg`.

    Raises:
        CheckpointError: the model isn't mono, or per timestep its hop length is odd.
    """

    def __init__(self, model: CompressionModel, per_timestep: bool = False) -> None:
        super().__init__()
        if model.channels != 1:
            raise CheckpointError(
                "interleave_stereo_codebooks.use needs a mono compression model, and this one has "
                f"{model.channels} channels; pair it with the one it was trained with"
            )
        if per_timestep and model.hop_length % 2:
            raise CheckpointError(
                "interleave_stereo_codebooks.per_timestep needs a compression model of an even hop length, "
                f"and this one's is {model.hop_length}; pair it with the one it was trained with"
            )
        self.model = model
        self.per_timestep = per_timestep
        self.channels = 2
        self.sample_rate = model.sample_rate
        self.cardinality = model.cardinality
        steps = 2 if per_timestep else 1
        self.frame_rate = model.frame_rate * steps
        self.hop_length = model.hop_length // steps
        self.total_codebooks = model.total_codebooks * 2 // steps
        self.num_codebooks = model.num_codebooks * 2 // steps

    def set_num_codebooks(self, n: int) -> None:
        step = 1 if self.per_timestep else 2
        if n % step or not step <= n <= self.total_codebooks:
            multiple = "" if self.per_timestep else " and a multiple of 2, one per channel"
            raise ValueError(
                f"the number of codebooks must be from {step} to {self.total_codebooks}{multiple}, got {n}"
            )
        self.model.set_num_codebooks(n // step)
        self.num_codebooks = n

    def encode(self, wav: Tensor) -> tuple[Tensor, Tensor | None]:
        self.check_wav(wav)
        batch = wav.shape[0]
        codes, scale = self.model.encode(wav.reshape(batch * 2, 1, -1))  # [B * 2, K, T]
        codes = codes.unflatten(0, (batch, 2))  # [B, 2, K, T]
        codes = codes.movedim(1, 3).flatten(2) if self.per_timestep else codes.movedim(1, 2).flatten(1, 2)
        return codes, None if scale is None else scale.reshape(batch, 2)

    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        self.check_codes(codes)
        channels = self.split_channels(codes)
        if scale is not None and scale.shape != (codes.shape[0], 2):
            raise ValueError(f"scale must have shape [{codes.shape[0]}, 2], got {list(scale.shape)}")
        wav = self.model.decode(channels, None if scale is None else scale.reshape(-1, 1))  # [B * 2, 1, samples]
        return wav.unflatten(0, (-1, 2)).squeeze(2)

    def split_channels(self, codes: Tensor) -> Tensor:
        """Codes `[B, K, frames]` -> those of each channel `[B * 2, K', frames']`, for the mono model.

        Either K' is half of K or, per timestep, frames' is half of frames.

        Raises:
            ValueError: that number is odd.
        """
        axis = 2 if self.per_timestep else 1
        if codes.shape[axis] % 2:
            what = "frames" if self.per_timestep else "codebooks"
            raise ValueError(f"interleaved stereo codes come in pairs of {what}, got {codes.shape[axis]}")
        return codes.unflatten(axis, (codes.shape[axis] // 2, 2)).movedim(axis + 1, 1).flatten(0, 1)
