"""Decoding a clip while its codes are still being made."""

from __future__ import annotations

import torch
from torch import Tensor

from handler.compression.base import CompressionModel
from handler.compression.encodec import EncodecModel
from handler.compression.interleaved import InterleavedStereo
from handler.compression.stages import NeedsWholeClipError, Stage, inputs_for, make_stages, run


class StreamingDecoder:
    """One clip's codes to audio, chunk by chunk.

    Whatever the chunks, their audio in a row is that of `model.decode(codes[None])[0]`, up to float32 rounding. Only
    what later codes could still change is held back, and nothing else is kept: memory doesn't grow with the clip.

    A model that cannot do this is decoded whole, by `finish`: one that isn't an EnCodec (DAC), or an EnCodec with group
    norms, circular padding or an activation that mixes positions.

    Args:
        model: its weights must not change or move any more.
    """

    def __init__(self, model: CompressionModel) -> None:
        self._model = model
        self._stages = _make_stages(model)
        # How many frames can only be decoded together.
        self._group = 2 if isinstance(model, InterleavedStereo) and model.per_timestep else 1
        self._codes: Tensor | None = None  # [1, K, n], not decoded yet
        self._finished = False

    @property
    def lookahead_frames(self) -> int | None:
        """How many more frames settle a frame's audio (4 for MusicGen's EnCodec); None: all that there will be."""
        return None if self._stages is None else self._group * inputs_for(self._stages, 0)

    def push(self, codes: Tensor) -> Tensor:
        """Take the next frames.

        Args:
            codes: integers `[K, n]`, of the same K in every chunk; n may be 0.

        Returns:
            float32 `[channels, m]`, the audio that has become settled; m may be 0.

        Raises:
            ValueError: `model.decode` doesn't take such codes, or the clip is finished.
        """
        self._check_open()
        if codes.ndim != 2:
            raise ValueError(f"the codes of a chunk must have shape [codebooks, frames], got {list(codes.shape)}")
        if codes.shape[1]:
            codes = codes[None]  # [1, K, n]
            self._model.check_codes(codes)  # where they are: on a GPU it would have to wait for the answer
            codes = codes.to(next(self._model.parameters()).device)
            self._codes = codes if self._codes is None else torch.cat([self._codes, codes], 2)
        return self._decode(last=False)

    def finish(self) -> Tensor:
        """End the clip, and give the rest of its audio: float32 `[channels, m]`, m may be 0.

        Raises:
            ValueError: `model.decode` doesn't take this number of frames, or the clip is finished.
        """
        self._check_open()
        self._finished = True
        return self._decode(last=True)

    def _check_open(self) -> None:
        if self._finished:
            raise ValueError("this clip is finished: make a StreamingDecoder for each clip")

    def _decode(self, last: bool) -> Tensor:
        if self._codes is None or (self._stages is None and not last):
            return torch.zeros(self._model.channels, 0, device=next(self._model.parameters()).device)
        if self._stages is None:
            return self._model.decode(self._codes)[0]
        frames = self._codes.shape[2]
        ready = frames if last else frames - frames % self._group
        codes, self._codes = self._codes[..., :ready], self._codes[..., ready:]
        latent = _decode_latent(self._model, codes)  # [B, dimension, n]: a row for each separately coded channel
        audio = run(self._stages, latent.transpose(1, 2), last)  # [B, m, channels]
        return audio.transpose(1, 2).flatten(0, 1)


def _make_stages(model: CompressionModel) -> list[Stage] | None:
    coder = model.model if isinstance(model, InterleavedStereo) else model
    if not isinstance(coder, EncodecModel):
        return None
    try:
        return make_stages(coder.decoder)
    except NeedsWholeClipError:
        return None


def _decode_latent(model: CompressionModel, codes: Tensor) -> Tensor:
    if isinstance(model, InterleavedStereo):
        return _decode_latent(model.model, model.split_channels(codes))
    assert isinstance(model, EncodecModel)
    return model.quantizer.decode(codes.long())
