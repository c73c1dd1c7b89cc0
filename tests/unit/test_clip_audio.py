"""The audio a request brings reaches the engine in the model's form, and no more of it than its music depends on."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch

from handler.audio import convert_audio
from handler.clip_audio import ClipAudio, audio_of
from handler.conditioners.base import WavInput
from handler.decoder import Decoder, Decoders, DecodingAbandonedError
from handler.engine.messages import Card, StyleCard
from handler.errors import RequestError
from handler.params import Clip
from handler.question import ClipQuestion
from handler.request import GenerationRequest, Limits
from handler.request_parser import RequestParser
from tests.unit.test_style_conditioner import built

RATE, FILE_RATE = 32_000, 22_050
STYLE = StyleCard(RATE, 3.0, True, 6)
DECODERS = Decoders()
CARD = Card(RATE, 1, 50.0, 30.0, ("description", "self_wav"), "cpu", "float32", 8, "style", STYLE)


def song(seconds: float) -> np.ndarray:
    return 0.1 * np.random.default_rng(3).standard_normal((int(seconds * FILE_RATE), 2)).astype(np.float32)


def asked(kind: str | None, **fields: Any) -> GenerationRequest:
    for name in ("melody", "style", "continuation"):
        if name in fields:
            buffer = io.BytesIO()
            soundfile.write(buffer, song(fields[name]), FILE_RATE, format="WAV", subtype="FLOAT")
            fields[name] = base64.b64encode(buffer.getvalue()).decode()
    parser = RequestParser(Limits(120.0, 600.0, 512, 2**25, 600.0, 50.0, 30.0, kind))
    question = parser.parse({"body": fields}, {"content-type": "application/json"})
    assert isinstance(question, ClipQuestion)
    return question.request


def read(request: GenerationRequest, card: Card = CARD) -> Clip:
    audio = audio_of(request, card, DECODERS)
    assert audio is not None
    clip = audio.added_to(Clip("pop"))
    waves = [wav for wav in (clip.melody, clip.continuation) if wav is not None]
    for wav in waves:
        assert wav.untyped_storage().nbytes() == wav.nbytes  # nothing more is kept
    assert sum(wav.nbytes for wav in waves) <= audio.size
    assert clip.description == "pop"
    return clip


def converted(seconds: float, channels: int = 1) -> torch.Tensor:
    return convert_audio(torch.from_numpy(song(seconds).T.copy()), FILE_RATE, RATE, channels)


def test_without_audio_there_is_nothing_to_read() -> None:
    assert audio_of(asked("chroma", prompt="pop"), CARD, DECODERS) is None


@pytest.mark.parametrize("channels", [1, 2])
def test_a_melody_is_brought_to_the_model_s_rate_and_channels(channels: int) -> None:
    card = Card(RATE, channels, 50.0, 30.0, ("self_wav",), "cpu", "float32", 8, "chroma")
    clip = read(asked("chroma", melody=3), card)
    assert clip.melody is not None
    assert torch.equal(clip.melody, converted(3, channels))
    assert clip.melody_sample_rate == RATE


@pytest.mark.parametrize("use_middle", [True, False])
@pytest.mark.parametrize("length", [None, 1.5])
def test_the_excerpt_of_a_style_is_the_one_that_the_model_takes_of_the_whole(
    use_middle: bool, length: float | None
) -> None:
    style = built(use_middle_of_segment=use_middle)
    card = replace(CARD, style=StyleCard(RATE, style.params.excerpt_length, use_middle, 6))
    clip = read(asked("style", style=7, seed=11, excerpt_length=length), card)
    assert clip.melody is not None
    whole = converted(7).mean(dim=0)
    of_whole, _ = style.excerpt(WavInput(whole, RATE, 11, excerpt_length=length))
    of_excerpt, _ = style.excerpt(WavInput(clip.melody.mean(dim=0), RATE, 11, excerpt_length=length))
    assert clip.melody.shape == of_whole.shape
    assert torch.equal(of_excerpt, of_whole)


def test_a_style_that_is_too_short_for_its_excerpt_is_left_to_the_model() -> None:
    clip = read(asked("style", style=2))
    assert clip.melody is not None
    assert clip.melody.shape == (1, 2 * RATE)


def test_a_clip_of_several_windows_has_as_much_of_the_style_as_they_look_at() -> None:
    clip = read(asked("style", style=100, duration=31))
    assert clip.melody is not None
    assert clip.melody.shape == (1, (31 + 60) * RATE)


def test_a_style_at_another_rate_than_the_model_s_reaches_it_whole() -> None:
    card = replace(CARD, style=StyleCard(24_000, 3.0, True, 6))
    clip = read(asked("style", style=10), card)
    assert clip.melody is not None
    assert clip.melody.shape == (1, 10 * RATE)


def test_of_audio_to_continue_there_is_the_excerpt() -> None:
    clip = read(asked(None, continuation=6, continuation_start=2, continuation_end=3.5))
    assert clip.continuation is not None
    assert clip.continuation.shape == (1, int(1.5 * RATE))
    assert clip.continuation_sample_rate == RATE


@pytest.mark.parametrize(
    ("fields", "field", "complaint"),
    [
        ({"continuation_start": 2.5}, "continuation_start", "at most 2, the audio's length, not 2.5"),
        ({"continuation_end": 2.5}, "continuation_end", "at most 2, the audio's length, not 2.5"),
        ({"continuation_start": 1.99}, "continuation_start", "at least 0.02 seconds"),
        ({"duration": 2}, "duration", "counts the excerpt to continue, 2 seconds"),
        ({"continuation_start": 0.4, "duration": 1.5}, "duration", "counts the excerpt to continue, 1.6 seconds"),
    ],
)
def test_an_excerpt_that_does_not_fit_its_audio_is_refused(
    fields: dict[str, float], field: str, complaint: str
) -> None:
    with pytest.raises(RequestError, match=complaint) as caught:
        read(asked(None, continuation=2, **fields))
    assert caught.value.field == field


def test_audio_longer_than_the_window_is_refused_without_decoding_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = Mock(side_effect=Decoder.next_message)
    monkeypatch.setattr(Decoder, "next_message", lambda decoder: blocks(decoder))
    with pytest.raises(RequestError, match=r"shorter than the model's window of 30 seconds, not 30.* or more"):
        read(asked(None, continuation=90, duration=100))
    assert blocks.call_count < 40  # of about a second each


def test_audio_that_nobody_waits_for_any_more_is_not_decoded() -> None:
    audio = audio_of(asked("chroma", melody=100), CARD, DECODERS)
    assert audio is not None
    asked_again = iter([True, False])
    with pytest.raises(DecodingAbandonedError):
        audio.added_to(Clip(), lambda: next(asked_again))
    assert read(asked("chroma", melody=3)).melody is not None


def test_what_it_takes_is_known_before_anything_is_decoded() -> None:
    request = asked("style", style=100)
    audio = ClipAudio(request, CARD, DECODERS)
    assert request.style is not None
    assert audio.size == len(request.style.data) + 3 * RATE * 4


def test_a_file_that_turns_out_damaged_names_its_field() -> None:
    buffer = io.BytesIO()
    soundfile.write(buffer, song(3), FILE_RATE, format="FLAC")
    file = buffer.getvalue()
    data = base64.b64encode(file[: len(file) // 2]).decode()
    parser = RequestParser(Limits(120.0, 600.0, 512, 2**25, 600.0, 50.0, 30.0, "chroma"))
    question = parser.parse({"body": {"melody": data}}, {"content-type": "application/json"})
    assert isinstance(question, ClipQuestion)
    with pytest.raises(RequestError) as caught:
        ClipAudio(question.request, CARD, DECODERS).added_to(Clip())
    assert caught.value.field == "melody"
