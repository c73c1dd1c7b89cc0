"""Streamed audio against recorded outputs of audiocraft, float32 on a CPU."""

from __future__ import annotations

import pytest
import torch

from handler.compression.streaming import StreamingDecoder
from tests.parity.test_compression import AUDIO, arrays, assert_close, exported, stereo_of


@pytest.mark.parametrize("size", [1, 7, 1000])
@pytest.mark.parametrize("name", ["codes_b", "fixed_codes", "one_codes"])
@pytest.mark.parametrize("folder", ["text_mono", "stereo_ac", "stereo_hf"])
def test_streamed_audio_is_the_recorded_one(folder: str, name: str, size: int) -> None:
    golden = arrays(f"{folder}/encodec.npz")
    model = exported(folder) if folder == "text_mono" else stereo_of(folder)
    codes, audio = golden[name], golden[name.replace("codes", "decoded")]
    for row, expected in zip(codes, audio, strict=True):
        decoder = StreamingDecoder(model)
        chunks = [decoder.push(chunk) for chunk in row.split(size, 1)]
        assert_close(torch.cat([*chunks, decoder.finish()], 1), expected, AUDIO)
