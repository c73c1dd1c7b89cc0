"""The audio that a request brings: how much of it its music depends on, and the reading of that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from handler.conditioners.excerpt import excerpt_place
from handler.decoder import Decoder, Decoders
from handler.engine.messages import Card, StyleCard
from handler.params import Clip
from handler.request import GenerationRequest
from handler.upload import Sound, Upload

_BYTES_OF_SAMPLE = 4


@dataclass(frozen=True, slots=True)
class ClipAudio:
    """What a clip is made from besides its text, still in the files that were uploaded.

    Read, it has the model's rate and channels, and is no longer than what the music can depend on: so what a request
    takes at most while it waits is known before anything is decoded.

    Args:
        request: has audio.
        card: of the model.
        decoders: that read the files.
    """

    request: GenerationRequest
    card: Card
    decoders: Decoders

    @property
    def size(self) -> int:
        """Bytes of the files, and the most that is kept of them."""
        uploads = [self.request.melody, self.request.style, self.request.continuation]
        files = sum(len(upload.data) for upload in uploads if upload is not None)
        seconds = self._seconds_of_melody() + self._seconds_of_continuation()
        return files + round(seconds * self.card.sample_rate) * self.card.channels * _BYTES_OF_SAMPLE

    @torch.inference_mode()
    def added_to(self, clip: Clip, wanted: Callable[[], bool] = lambda: True) -> Clip:
        """Decode it; the clip with it.

        Args:
            wanted: asked every moment; once it is false, nothing more is decoded.

        Raises:
            RequestError: for a file that cannot be read, is damaged, too short or too long, or is no audio.
            DecoderLostError, DecodingAbandonedError: as `Decoder.open`.
        """
        request, rate = self.request, self.card.sample_rate
        with self.decoders.one() as decoder:
            read = _Reader(decoder, rate, self.card.channels, wanted)
            if request.melody is not None:
                wav = read(request.melody, end=self._audible).wav()
                clip = replace(clip, melody=wav, melody_sample_rate=rate)
            if request.style is not None:
                clip = replace(clip, melody=self._style(request.style, read), melody_sample_rate=rate)
            if request.continuation is not None:
                wav = self._continuation(request.continuation, read)
                clip = replace(clip, continuation=wav, continuation_sample_rate=rate)
        return clip

    def _style(self, upload: Upload, read: _Reader) -> Tensor:
        card = self._looked_at
        if card is None:
            return read(upload, end=self._audible if self._extended else None).wav()
        sound, samples = read(upload), self._excerpt_samples(card)
        start = excerpt_place(sound.length, samples, card.use_middle, self.request.seed)
        return sound.wav() if start is None else sound.wav(start, start + samples)  # too short is the model's to refuse

    def _continuation(self, upload: Upload, read: _Reader) -> Tensor:
        request, card = self.request, self.card
        start, end = request.continuation_start, request.continuation_end

        def check(seconds: float) -> None:
            if end is None:
                request.check_excerpt((start or 0.0) + seconds, card.frame_rate, card.window, at_least=True)

        sound = read(upload, start, end, check)
        request.check_length(sound.seconds)
        request.check_excerpt(sound.seconds if end is None else end, card.frame_rate, card.window)
        return sound.wav()

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
            return min(self.request.melody.max_seconds, self._audible)
        if self.request.style is None:
            return 0.0
        if self._looked_at is not None:
            return self._excerpt_samples(self._looked_at) / self.card.sample_rate
        longest = self.request.style.max_seconds
        return min(longest, self._audible) if self._extended else longest

    def _seconds_of_continuation(self) -> float:
        end = self.request.continuation_end
        if self.request.continuation is None:
            return 0.0
        return self.card.window if end is None else end - (self.request.continuation_start or 0.0)


@dataclass(frozen=True, slots=True)
class _Reader:
    """Reads files with one decoder, to one sample rate and number of channels."""

    decoder: Decoder
    sample_rate: int
    channels: int
    wanted: Callable[[], bool]

    def __call__(
        self,
        upload: Upload,
        start: float | None = None,
        end: float | None = None,
        check: Callable[[float], None] = lambda seconds: None,
    ) -> Sound:
        return upload.read(self.decoder, self.sample_rate, self.channels, start, end, self.wanted, check)


def audio_of(request: GenerationRequest, card: Card, decoders: Decoders) -> ClipAudio | None:
    """The audio a request brings, or None."""
    brings = (request.melody, request.style, request.continuation)
    return ClipAudio(request, card, decoders) if any(upload is not None for upload in brings) else None
