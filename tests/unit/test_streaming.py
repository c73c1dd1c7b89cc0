"""A clip decoded chunk by chunk is the clip decoded whole, layer by layer."""

from __future__ import annotations

import dataclasses
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from handler.compression import (
    CompressionModel,
    EncodecConfig,
    EncodecModel,
    InterleavedStereo,
    SEANetConfig,
    lstm,
    stages,
)
from handler.compression.debug import debug_encodec
from handler.compression.lstm import ResumableLSTM
from handler.compression.streaming import StreamingDecoder

TINY: dict[str, Any] = {"dimension": 6, "n_filters": 4, "n_residual_layers": 1, "ratios": (3, 2), "lstm": 1}
HOP = 6

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stereo": {"channels": 2},
    "two_residual_layers": {"n_residual_layers": 2, "dilation_base": 3},
    "no_residual_layers": {"n_residual_layers": 0},
    "kernels": {"kernel_size": 5, "last_kernel_size": 3, "residual_kernel_size": 5},
    "even_kernels": {"kernel_size": 4, "last_kernel_size": 2, "residual_kernel_size": 2},
    "no_lstm": {"lstm": 0},
    "two_lstm_layers": {"lstm": 2},
    "convolved_skip": {"true_skip": False},
    "causal": {"causal": True},
    "causal_trimmed_left": {"causal": True, "trim_right_ratio": 0.0},
    "causal_trimmed_both": {"causal": True, "trim_right_ratio": 0.4},
    "other_activation": {"activation": "LeakyReLU", "activation_params": {"negative_slope": 0.3}},
    "final_activation": {"final_activation": "Tanh"},
}


def make_encodec(**options: Any) -> EncodecModel:
    network = SEANetConfig(**{**TINY, **options})
    model = EncodecModel(EncodecConfig(network, network, 4, 16, 60, 10.0))
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return model


def make_codes(frames: int, codebooks: int = 4) -> Tensor:
    return torch.randint(0, 16, (codebooks, frames), generator=torch.Generator().manual_seed(frames))


def whole(model: CompressionModel, codes: Tensor) -> Tensor:
    """`model.decode`, layer by layer over all of time."""
    if isinstance(model, InterleavedStereo):
        assert isinstance(model.model, EncodecModel)
        return model.model.decoder(model.model.decode_latent(model.split_channels(codes[None]))).squeeze(1)
    assert isinstance(model, EncodecModel)
    return model.decoder(model.decode_latent(codes[None]))[0]


def stream(model: CompressionModel, codes: Tensor, sizes: list[int]) -> Tensor:
    """The chunks have these sizes, the last one what is left."""
    decoder = StreamingDecoder(model)
    ends = [0, *torch.tensor(sizes, dtype=torch.long).cumsum(0).tolist(), codes.shape[1]]
    audio = [decoder.push(codes[:, start:end]) for start, end in pairwise(ends)]
    return torch.cat([*audio, decoder.finish()], 1)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("pad_mode", ["constant", "reflect", "replicate"])
@pytest.mark.parametrize("name", OPTIONS)
def test_every_network_can_be_streamed(name: str, pad_mode: str) -> None:
    model = make_encodec(pad_mode=pad_mode, **OPTIONS[name])
    assert StreamingDecoder(model).lookahead_frames is not None
    for frames in (1, 2, 3, 4, 5, 9, 23):
        codes = make_codes(frames)
        expected = whole(model, codes)
        assert expected.abs().max() < 10  # So that the tolerance means something.
        for sizes in ([], [1] * (frames - 1), [min(frames, 4), 0]):
            assert_same(stream(model, codes, sizes), expected)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=12),
    pad_mode=st.sampled_from(["constant", "reflect"]),
    causal=st.booleans(),
    form=st.sampled_from(["mono", "stereo", "stereo per timestep"]),
)
def test_the_chunks_do_not_matter(sizes: list[int], pad_mode: str, causal: bool, form: str) -> None:
    model: CompressionModel = make_encodec(pad_mode=pad_mode, causal=causal, true_skip=False)
    if form != "mono":
        model = InterleavedStereo(model, per_timestep=form.endswith("timestep"))
    codes = make_codes(sum(sizes) // 2 * 2 + 2, model.total_codebooks)
    assert_same(stream(model, codes, sizes[:-1]), whole(model, codes))


@pytest.mark.parametrize("pad_mode", ["constant", "reflect"])
@pytest.mark.parametrize("name", ["plain", "two_residual_layers", "causal", "causal_trimmed_left"])
def test_audio_comes_as_soon_as_it_is_settled(name: str, pad_mode: str) -> None:
    model = make_encodec(pad_mode=pad_mode, **OPTIONS[name])
    codes = make_codes(30)
    decoder = StreamingDecoder(model)
    lookahead, given = decoder.lookahead_frames, 0
    assert lookahead is not None
    for frame in range(30):
        given += decoder.push(codes[:, frame : frame + 1]).shape[1]
        if frame > 6:
            assert (frame + 1 - lookahead) * HOP <= given < (frame + 2 - lookahead) * HOP
    # Not sooner either: the next frame can change all that comes next.
    other = codes.clone()
    other[:, 20] = (other[:, 20] + 1) % 16
    changed = (whole(model, codes) - whole(model, other)).abs().amax(0).nonzero()[0].item()
    assert (20 - lookahead) * HOP <= changed < (21 - lookahead) * HOP


def test_musicgens_codec_looks_four_frames_ahead() -> None:
    network = SEANetConfig(n_filters=64, n_residual_layers=1, ratios=(8, 5, 4, 4), lstm=2)
    model = EncodecConfig(network, network, 4, 2048, 32_000, 50.0).build()
    assert StreamingDecoder(model).lookahead_frames == 4
    assert StreamingDecoder(InterleavedStereo(model)).lookahead_frames == 4
    assert StreamingDecoder(InterleavedStereo(model, per_timestep=True)).lookahead_frames == 8


def test_the_debug_model_can_be_streamed() -> None:
    model = debug_encodec()
    codes = make_codes(20)
    assert_same(stream(model, codes, [7, 7]), whole(model, codes))


def test_nothing_is_kept_but_the_context() -> None:
    decoder = StreamingDecoder(make_encodec(n_residual_layers=2, true_skip=False))
    sizes = []
    for _ in range(20):
        decoder.push(make_codes(10))
        sizes.append(carried(decoder._stages))
    assert sizes[3] == sizes[19]
    assert sizes[19] < 10_000


def carried(state: Any) -> int:
    """Bytes of all tensors in the stages, whole storages counted."""
    if isinstance(state, Tensor):
        return state.untyped_storage().nbytes()
    if isinstance(state, list | tuple):
        return sum(map(carried, state))
    if isinstance(state, stages.Stage):
        assert dataclasses.is_dataclass(state)
        return sum(carried(getattr(state, field.name)) for field in dataclasses.fields(state))
    return 0


def test_clips_do_not_disturb_each_other() -> None:
    model = make_encodec()
    clips = [make_codes(12), make_codes(13)[:, 1:]]
    decoders = [StreamingDecoder(model) for _ in clips]
    audio: list[list[Tensor]] = [[], []]
    for start in range(0, 12, 3):
        for decoder, codes, out in zip(decoders, clips, audio, strict=True):
            out.append(decoder.push(codes[:, start : start + 3]))
    for decoder, codes, out in zip(decoders, clips, audio, strict=True):
        assert torch.equal(torch.cat([*out, decoder.finish()], 1), stream(model, codes, [3, 3, 3]))


def test_a_clip_without_frames_has_no_audio() -> None:
    decoder = StreamingDecoder(make_encodec(channels=2))
    assert decoder.push(make_codes(0)).shape == (2, 0)
    assert decoder.finish().shape == (2, 0)


@pytest.mark.parametrize(
    "options",
    [
        {"norm": "time_group_norm"},
        {"pad_mode": "circular"},
        {"activation": "Softmax", "activation_params": {"dim": 2}},
    ],
)
def test_a_network_that_needs_the_whole_clip_gets_it(options: dict[str, Any]) -> None:
    for model in (make_encodec(**options), InterleavedStereo(make_encodec(**options))):
        codes = make_codes(11, model.total_codebooks)
        decoder = StreamingDecoder(model)
        assert decoder.lookahead_frames is None
        for start in range(0, 11, 4):
            assert decoder.push(codes[:, start : start + 4]).shape == (model.channels, 0)
        assert_same(decoder.finish(), whole(model, codes))


class Repeater(CompressionModel):
    """One codebook, whose codes are the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.channels, self.total_codebooks, self.num_codebooks, self.cardinality = 1, 1, 1, 16
        self.unit = torch.nn.Parameter(torch.ones(()), requires_grad=False)

    def encode(self, wav: Tensor) -> tuple[Tensor, Tensor | None]:
        return wav.long(), None

    def decode(self, codes: Tensor, scale: Tensor | None = None) -> Tensor:
        return codes * self.unit

    def set_num_codebooks(self, n: int) -> None:
        pass


def test_another_compression_model_is_decoded_whole() -> None:
    decoder = StreamingDecoder(Repeater())
    assert decoder.lookahead_frames is None
    assert decoder.push(torch.tensor([[1, 2]])).shape == (1, 0)
    assert decoder.push(torch.tensor([[3]])).shape == (1, 0)
    assert decoder.finish().tolist() == [[1, 2, 3]]


def test_a_finished_clip_takes_nothing_more() -> None:
    decoder = StreamingDecoder(make_encodec())
    decoder.push(make_codes(3))
    decoder.finish()
    with pytest.raises(ValueError, match="clip is finished"):
        decoder.push(make_codes(1))
    with pytest.raises(ValueError, match="clip is finished"):
        decoder.finish()


def test_codes_that_decode_refuses_are_refused() -> None:
    decoder = StreamingDecoder(make_encodec())
    with pytest.raises(ValueError, match=r"must have shape \[codebooks, frames\], got \[1, 4, 3\]"):
        decoder.push(make_codes(3)[None])
    with pytest.raises(ValueError, match=r"\[0, 16\), got 16"):
        decoder.push(torch.full((4, 3), 16))
    with pytest.raises(ValueError, match="1 to 4 codebooks"):
        decoder.push(make_codes(3, 5))
    with pytest.raises(ValueError, match="pairs of codebooks, got 3"):
        StreamingDecoder(InterleavedStereo(make_encodec())).push(make_codes(3, 3))
    decoder = StreamingDecoder(InterleavedStereo(make_encodec(), per_timestep=True))
    decoder.push(make_codes(5))
    with pytest.raises(ValueError, match="pairs of frames, got 1"):
        decoder.finish()


@pytest.mark.parametrize("frames", [1, 2, 3, 6, 7, 20])
@pytest.mark.parametrize("pad_mode", ["constant", "reflect"])
def test_a_whole_clip_may_be_decoded_in_chunks(frames: int, pad_mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "CACHED_VALUES", 40)
    model, codes = make_encodec(pad_mode=pad_mode), make_codes(frames)
    assert_same(model.decode(codes[None])[0], whole(model, codes))


@pytest.mark.parametrize("prepacked", [True, False])
@pytest.mark.parametrize("rows", [1, 3])
def test_an_lstm_goes_on_where_it_stopped(prepacked: bool, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lstm, "_CAN_PREPACK", prepacked)
    torch.manual_seed(0)
    plain, x = torch.nn.LSTM(8, 8, 2).requires_grad_(False), torch.randn(9, rows, 8)
    expected, (hidden, cell) = plain(x)
    resumable = ResumableLSTM(plain)
    first, state = resumable(x[:4], None)
    second, state = resumable(x[4:].transpose(0, 1).contiguous().transpose(0, 1), state)
    torch.testing.assert_close(torch.cat([first, second]), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(state, (hidden, cell), rtol=0, atol=1e-6)
