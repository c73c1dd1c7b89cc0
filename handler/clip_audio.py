"""The audio that a request brings: how much of it its music depends on, and the reading of that."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from handler.audio import convert_audio
from handler.conditioners.excerpt import excerpt_of
from handler.engine.messages import Card, StyleCard
from handler.params import Clip
from handler.request import GenerationRequest
from handler.upload import Upload

_BYTES_OF_SAMPLE = 4


@dataclass(frozen=True, slots=True)
class ClipAudio:
    """What a clip is made from besides its text, still in the files that were uploaded.

    Read, it has the model's rate and channels, and is no longer than what the music can depend on: so what a request
    takes while it waits is known before anything is decoded.

    Args:
        request: has audio.
        card: of the model.
    """

    request: GenerationRequest
    card: Card

    @property
    def size(self) -> int:
        """Bytes of the files, and of what is kept of them."""
        uploads = [self.request.melody, self.request.style, self.request.continuation]
        files = sum(len(upload.data) for upload in uploads if upload is not None)
        seconds = self._seconds_of_melody() + self._seconds_of_continuation()
        return files + round(seconds * self.card.sample_rate) * self.card.channels * _BYTES_OF_SAMPLE

    @torch.inference_mode()
    def added_to(self, clip: Clip) -> Clip:
        """Decodes it, and gives the clip with it.

        Raises:
            RequestError: for a file that turns out damaged, or holds samples that are no audio.
        """
        request, rate = self.request, self.card.sample_rate
        if request.melody is not None:
            clip = replace(clip, melody=self._read(request.melody, end=self._audible), melody_sample_rate=rate)
        if request.style is not None:
            clip = replace(clip, melody=self._style(request.style), melody_sample_rate=rate)
        if request.continuation is not None:
            wav = self._read(request.continuation, request.continuation_start, request.continuation_end)
            clip = replace(clip, continuation=wav, continuation_sample_rate=rate)
        return clip

    def _style(self, upload: Upload) -> Tensor:
        card = self._looked_at
        if card is None:
            return self._read(upload, end=self._audible if self._extended else None)
        wav = self._read(upload)
        excerpt = excerpt_of(wav, self._excerpt_samples(card), card.use_middle, self.request.seed)
        return wav if excerpt is None else excerpt.clone()  # one that does not fit is the model's to refuse

    def _read(self, upload: Upload, start: float | None = None, end: float | None = None) -> Tensor:
        """float32 `[channels, T]` at the model's rate."""
        wav = convert_audio(upload.read(start, end), upload.sample_rate, self.card.sample_rate, self.card.channels)
        return wav.clone(memory_format=torch.contiguous_format)  # a view would keep all that it is of

    @property
    def _audible(self) -> float:
        """Seconds of a melody that can matter: what follows the clip's last window changes nothing, nor does it change
        how that window's end is separated."""
        return self.request.duration + 2 * self.card.window

    @property
    def _extended(self) -> bool:
        """Whether the clip has several windows, each of which looks at the audio from its own time on."""
        rate = self.card.frame_rate
        return int(self.request.duration * rate) > int(self.card.window * rate)

    @property
    def _looked_at(self) -> StyleCard | None:
        """Of a style, what the model looks at, where that is one excerpt in the model's own samples; else None."""
        style = self.card.style
        fits = style is not None and style.sample_rate == self.card.sample_rate and not self._extended
        return style if fits else None

    def _excerpt_samples(self, style: StyleCard) -> int:
        given = self.request.excerpt_length
        return int((style.excerpt_length if given is None else given) * style.sample_rate)

    def _seconds_of_melody(self) -> float:
        if self.request.melody is not None:
            return min(self.request.melody.seconds, self._audible)
        if self.request.style is None:
            return 0.0
        if self._looked_at is not None:
            return self._excerpt_samples(self._looked_at) / self.card.sample_rate
        return min(self.request.style.seconds, self._audible) if self._extended else self.request.style.seconds

    def _seconds_of_continuation(self) -> float:
        audio, end = self.request.continuation, self.request.continuation_end
        if audio is None:
            return 0.0
        return (audio.seconds if end is None else end) - (self.request.continuation_start or 0.0)


def audio_of(request: GenerationRequest, card: Card) -> ClipAudio | None:
    """The audio a request brings, or None."""
    brings = (request.melody, request.style, request.continuation)
    return ClipAudio(request, card) if any(upload is not None for upload in brings) else None
