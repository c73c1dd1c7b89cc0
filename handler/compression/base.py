"""What every compression model offers: audio to codes and back."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class CompressionModel(nn.Module, ABC):
    """Turns audio into codes and codes into audio.

    Attributes:
        sample_rate: of the audio, in Hz.
        channels: of the audio.
        frame_rate: frames of codes per second.
        hop_length: samples per frame of codes.
        num_codebooks: K, the codebooks in use.
        total_codebooks: the codebooks there are; K is at most this.
        cardinality: codes per codebook; a code is in [0, cardinality).
    """

    sample_rate: int
    channels: int
    frame_rate: float
    hop_length: int
    num_codebooks: int
    total_codebooks: int
    cardinality: int

    @abstractmethod
    def encode(self, wav: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode audio.

        Args:
            wav: float32 `[B, channels, T]`, at `sample_rate`, T at least 1.

        Returns:
            codes: int64 `[B, num_codebooks, frames]`, the last frame filled up by padding.
            scale: float32 `[B, 1]` (one column per separately coded channel) where the model normalises
                the volume of its input, else None.

        Raises:
            ValueError: the shape or dtype is another one.
        """

    @abstractmethod
    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        """Decode codes, all frames at once.

        Args:
            codes: integers `[B, K, frames]`, K from 1 to `total_codebooks`.
            scale: what `encode` gave with them.

        Returns:
            float32 `[B, channels, frames * hop_length]`: whole frames, not cut to the length encoded.

        Raises:
            ValueError: the shape, dtype or range is another one, or a scale has no meaning here.
        """

    def set_num_codebooks(self, n: int) -> None:
        """Use the first `n` codebooks in `encode`.

        Raises:
            ValueError: `n` is out of bounds, which the message names.
        """
        if not 1 <= n <= self.total_codebooks:
            raise ValueError(f"the number of codebooks must be from 1 to {self.total_codebooks}, got {n}")
        self.num_codebooks = n

    def check_wav(self, wav: Tensor) -> None:
        """Raise a ValueError unless `wav` is what `encode` takes."""
        if wav.ndim != 3 or wav.shape[1] != self.channels or wav.shape[2] == 0:
            raise ValueError(
                f"wav must have shape [batch, {self.channels}, samples] with at least one sample, "
                f"got {list(wav.shape)}; convert the number of channels first"
            )
        if wav.dtype != torch.float32:
            raise ValueError(f"wav must be float32, got {wav.dtype}; call .float() on it")

    def check_codes(self, codes: Tensor) -> None:
        """Raise a ValueError unless `codes` is what `decode` takes."""
        if codes.ndim != 3 or not 1 <= codes.shape[1] <= self.total_codebooks or codes.shape[2] == 0:
            raise ValueError(
                f"codes must have shape [batch, codebooks, frames] with 1 to {self.total_codebooks} "
                f"codebooks and at least one frame, got {list(codes.shape)}"
            )
        if codes.is_floating_point() or codes.is_complex() or codes.dtype == torch.bool:
            raise ValueError(f"codes must be integers, got {codes.dtype}")
        # An index out of range is an unrecoverable fault on a GPU, so it is worth looking before.
        if codes.numel() and not bool(((codes >= 0) & (codes < self.cardinality)).all()):
            raise ValueError(
                f"codes must be in [0, {self.cardinality}), got {int(codes.min())} to {int(codes.max())}; "
                "special tokens have to be removed first"
            )
