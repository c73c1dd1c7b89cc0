"""What the offline API takes, and how it refuses the rest: by a RequestError that names the argument."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from handler.arguments import as_audio, as_batch, as_count, as_descriptions, as_melodies, as_rate
from handler.errors import RequestError
from handler.musicgen import MusicGen
from handler.params import GenerationParams
from tests.parity.models import load

pytestmark = pytest.mark.faults

RATE = 32_000
TONE = torch.sin(torch.arange(8000) / 20).mul(0.5).view(1, -1)  # [C, T]


@pytest.fixture(scope="module")
def model() -> MusicGen:
    return load("text_mono")


@pytest.fixture(scope="module")
def melody_model() -> MusicGen:
    return load("melody")


AUDIO: dict[str, Tensor | np.ndarray] = {
    "float64": TONE.double(),
    "float32 array": TONE.numpy(),
    "float64 array": TONE.double().numpy(),
    "big-endian array": TONE.numpy().astype(">f4"),
    "reversed view": TONE.flip(1).numpy()[:, ::-1],
    "long double array": TONE.numpy().astype(np.longdouble),
    "with gradients": TONE.clone().requires_grad_(),
}
ROUNDED: dict[str, tuple[Tensor | np.ndarray, float]] = {
    "float16": (TONE.half(), 1e-3),
    "bfloat16": (TONE.bfloat16(), 1e-2),
    "int16": ((TONE * 32768).short(), 1 / 32768),
    "int16 array": ((TONE.numpy() * 32768).astype(np.int16), 1 / 32768),
    "int16 big-endian array": ((TONE.numpy() * 32768).astype(">i2"), 1 / 32768),
    "int32": ((TONE.double() * 2**31).int(), 1e-7),
    "int8": ((TONE * 128).to(torch.int8), 1 / 128),
    "uint8": ((TONE * 128 + 128).to(torch.uint8), 1 / 128),
    "uint8 array": ((TONE.numpy() * 128 + 128).astype(np.uint8), 1 / 128),
}


@pytest.mark.parametrize("audio", AUDIO.values(), ids=AUDIO)
def test_audio_of_any_float_type_is_the_same_audio(audio: Any) -> None:
    assert torch.equal(as_audio(audio, "prompt"), TONE)


@pytest.mark.parametrize(("audio", "tolerance"), ROUNDED.values(), ids=ROUNDED)
def test_samples_of_other_types_are_fractions_of_full_scale(audio: Any, tolerance: float) -> None:
    wav = as_audio(audio, "prompt")
    assert wav.dtype is torch.float32
    torch.testing.assert_close(wav, TONE, atol=tolerance, rtol=0)


def test_full_scale_of_int16_is_one() -> None:
    assert as_audio(torch.tensor([[-32768, 0, 16384]], dtype=torch.int16), "prompt").tolist() == [[-1.0, 0.0, 0.5]]


def test_a_batch_or_one_waveform_is_taken() -> None:
    for given in (TONE, TONE[None], TONE.numpy()[None]):
        [wav] = as_batch(given, "prompt")
        assert torch.equal(wav, TONE)
    first, none, third = as_melodies([TONE, None, TONE.numpy()], "melody_wavs")
    assert first is not None
    assert third is not None
    assert none is None
    assert torch.equal(first, third)


NAN = TONE.clone()
NAN[0, 5] = math.nan
BAD_AUDIO: dict[str, tuple[Any, str]] = {
    "NaN": (NAN, r"must be finite numbers; sample 5 of channel 0 is not"),
    "infinity": (torch.full((1, 9), math.inf), r"must be finite"),
    "beyond float32": (torch.full((1, 9), 1e300, dtype=torch.float64), r"must be finite"),
    "no samples": (torch.zeros(1, 0), r"must hold at least one sample"),
    "no channels": (torch.zeros(0, 9), r"must hold at least one sample"),
    "transposed": (
        torch.zeros(8000, 2),
        r"must be \[channels, time\], not \[time, channels\] = \[8000, 2\]; write wav\.T",
    ),
    "int64": (torch.zeros(1, 9).long(), r"must be of dtype float16, .*, not int64"),
    "bool": (torch.zeros(1, 9).bool(), r"must be of dtype .*, not bool"),
    "complex": (torch.zeros(1, 9, dtype=torch.complex64), r"must be of dtype .*, not complex64"),
    "uint16 array": (np.zeros((1, 9), np.uint16), r"must be of dtype .*, not uint16"),
    "objects": (np.array([["a"]], object), r"must be of dtype .*, not object"),
    "text": ("melody.wav", r"must be a tensor"),
    "a list of numbers": ([[0.0, 1.0]], r"must be a tensor or a NumPy array, not a list"),
    "None": (None, r"must be a tensor"),
    "sparse": (torch.zeros(1, 9).to_sparse(), r"must be a dense tensor"),
    "meta": (torch.zeros(1, 9, device="meta"), r"must be a dense tensor"),
}


@pytest.mark.parametrize(("audio", "says"), BAD_AUDIO.values(), ids=BAD_AUDIO)
def test_audio_that_is_none_is_refused_by_both_arguments(
    audio: Any, says: str, model: MusicGen, melody_model: MusicGen
) -> None:
    with pytest.raises(RequestError, match=rf"^prompt: {says}"):
        model.generate_continuation(audio, RATE)
    if not isinstance(audio, list):
        with pytest.raises(RequestError, match=rf"^melody_wavs: {says}"):
            melody_model.generate_with_chroma(["a"], audio, RATE)
    if audio is not None:
        with pytest.raises(RequestError, match=rf"^melody_wavs: {says if not isinstance(audio, list) else 'must be'}"):
            melody_model.generate_with_chroma(["a"], [audio], RATE)


def test_shapes_are_those_of_audiocraft(model: MusicGen, melody_model: MusicGen) -> None:
    for shape in ((9,), (1, 1, 1, 9), ()):
        with pytest.raises(RequestError, match=r"^prompt: must be \[batch, channels, time\] or \[channels, time\]"):
            model.generate_continuation(torch.zeros(shape), RATE)
    with pytest.raises(RequestError, match=r"^melody_wavs: must be \[channels, time\], .*; write wav\[None\]"):
        melody_model.generate_with_chroma(["a"], [torch.zeros(9)], RATE)
    with pytest.raises(RequestError, match=r"^melody_wavs: there are 2 for 1 descriptions"):
        melody_model.generate_with_chroma(["a"], torch.zeros(2, 1, 900), RATE)
    with pytest.raises(RequestError, match=r"^prompt: there are 1 for 2 descriptions"):
        model.generate_continuation(TONE, RATE, ["a", "b"])


def test_audio_that_is_shorter_than_one_sample_of_the_model_is_refused(model: MusicGen, melody_model: MusicGen) -> None:
    with pytest.raises(RequestError, match=r"^continuation: is shorter than one sample at the model's 32000 Hz"):
        model.generate_continuation(torch.zeros(1, 1), 768_000)
    with pytest.raises(RequestError, match=r"^melody: is shorter than one sample at the model's 32000 Hz"):
        melody_model.generate_with_chroma(["a"], [torch.zeros(1, 1)], 768_000)


@pytest.mark.parametrize("rate", [np.int64(RATE), np.int32(RATE), np.float64(RATE), 32000.0, torch.tensor(RATE)])
def test_rates_may_be_whole_numbers_of_any_type(rate: Any) -> None:
    assert as_rate(rate, "rate") == RATE
    assert type(as_rate(rate, "rate")) is int


@pytest.mark.parametrize(
    "rate", [0, -1, 975, 44_101, 768_001, 44100.5, math.nan, math.inf, None, True, "32000", [RATE], 10**30]
)
def test_a_rate_that_is_none_is_refused_by_both_arguments(rate: Any, model: MusicGen, melody_model: MusicGen) -> None:
    says = "must be a whole number of Hz from 1000 to 768000 and a multiple of 25, not"
    with pytest.raises(RequestError, match=rf"^prompt_sample_rate: {says}"):
        model.generate_continuation(TONE, rate)
    with pytest.raises(RequestError, match=rf"^melody_sample_rate: {says}"):
        melody_model.generate_with_chroma(["a"], [TONE], rate)


BAD_TEXTS: list[tuple[Any, str]] = [
    ("calm piano", r"must be a list of texts, not one text; write \['calm piano'\]"),
    (b"calm", "must be a list of texts, not one text"),
    (None, "must be a list of texts or None, not None"),
    (7, "must be a list of texts or None, not 7"),
    ({"a": 1}, "must be a list of texts or None, not a dict"),
    (["a", 3], "must be a list of texts or None; item 1 is 3"),
    ([["a"]], "must be a list of texts or None; item 0 is a list"),
    (["\ud800"], "item 0 is not valid Unicode"),
]


@pytest.mark.parametrize(("texts", "says"), BAD_TEXTS)
def test_descriptions_that_are_none_are_refused(texts: Any, says: str, model: MusicGen, melody_model: MusicGen) -> None:
    calls: list[Callable[[], object]] = [
        lambda: model.generate(texts),
        lambda: melody_model.generate_with_chroma(texts, [TONE], RATE),
    ]
    if texts is not None:
        calls.append(lambda: model.generate_continuation(TONE, RATE, texts))
    for call in calls:
        with pytest.raises(RequestError, match=rf"^descriptions: {says}"):
            call()


def test_descriptions_may_be_any_series_of_texts() -> None:
    for given in (["a", None], ("a", None), np.array(["a", None], object), iter(["a", None])):
        assert as_descriptions(given) == ["a", None]
    assert type(as_descriptions(np.array(["a"]))[0]) is str


def test_nothing_to_generate_is_said_so(model: MusicGen, melody_model: MusicGen) -> None:
    for call in (
        lambda: model.generate([]),
        lambda: melody_model.generate_with_chroma([], [], RATE),
        lambda: model.generate_continuation(torch.zeros(0, 1, 9), RATE),
    ):
        with pytest.raises(RequestError, match="nothing to generate"):
            call()


def test_counts_are_whole_numbers_from_one(model: MusicGen) -> None:
    assert as_count(np.int64(3), "num_samples") == 3
    for count in (0, -1, 1.5, None, "2", True, math.nan):
        with pytest.raises(RequestError, match=r"^num_samples: must be a whole number of at least 1"):
            model.generate_unconditional(count)  # type: ignore[arg-type]


BAD_PARAMS: list[tuple[str, Any, str]] = [
    ("duration", "8", "must be a number, not '8'"),
    ("duration", None, "must be a number, not None"),
    ("duration", math.inf, "must be a finite number"),
    ("duration", 1e9, "at most 86400"),
    ("duration", 10**400, "must be a finite number"),
    ("duration", torch.tensor(3.0), "must be a number"),
    ("duration", True, "must be a number, not True"),
    ("top_k", 250.0, "must be a whole number, not 250.0"),
    ("top_k", None, "must be a whole number, not None"),
    ("top_k", "250", "must be a whole number"),
    ("top_p", math.nan, "must be a finite number"),
    ("top_p", "0.9", "must be a number"),
    ("temperature", math.nan, "must be a finite number"),
    ("temperature", [1.0], "must be a number"),
    ("cfg_coef", None, "must be a number"),
    ("cfg_coef", 3j, "must be a number"),
    ("cfg_coef_beta", math.nan, "must be a finite number"),
    ("extend_stride", math.nan, "must be a finite number"),
    ("extend_stride", -1.0, "must be a number of seconds above 0"),
    ("extend_stride", "18", "must be a number"),
    ("use_sampling", "yes", "must be true or false, not 'yes'"),
    ("use_sampling", None, "must be true or false"),
    ("two_step_cfg", 1, "must be true or false, not 1"),
    ("seed", 1.5, "must be a whole number"),
    ("seed", "7", "must be a whole number"),
]


@pytest.mark.parametrize(("field", "value", "says"), BAD_PARAMS)
def test_a_setting_of_another_type_is_refused_and_changes_nothing(
    field: str, value: Any, says: str, model: MusicGen
) -> None:
    before = model.generation_params
    with pytest.raises(RequestError, match=rf"^{field}: .*{says}") as error:
        model.set_generation_params(**{field: value})
    assert error.value.field == field
    assert model.generation_params == before


def test_settings_may_be_numpy_s_numbers() -> None:
    params = GenerationParams(
        top_k=np.int64(7),  # type: ignore[arg-type]
        seed=np.uint32(3),  # type: ignore[arg-type]
        duration=np.float32(2.5),  # type: ignore[arg-type]
        temperature=Fraction(1, 2),  # type: ignore[arg-type]
        use_sampling=np.bool_(False),  # type: ignore[arg-type]
    )
    assert params == GenerationParams(top_k=7, seed=3, duration=2.5, temperature=0.5, use_sampling=False)
    assert [type(getattr(params, name)) for name in ("top_k", "duration", "use_sampling")] == [int, float, bool]


@pytest.mark.parametrize(
    ("field", "value"),
    [("eval_q", "3"), ("eval_q", 1.5), ("excerpt_length", math.nan), ("excerpt_length", "3"), ("ds_factor", 2.5)],
)
def test_a_style_setting_of_another_type_is_refused(field: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{field}: must be"):
        load("style").set_style_conditioner_params(**{field: value})


def test_other_arguments_are_looked_at_too(model: MusicGen) -> None:
    for seconds in ("3", None, math.nan, 0):
        with pytest.raises(RequestError, match=r"^max_duration: must be"):
            model.max_duration = seconds  # type: ignore[assignment]
    with pytest.raises(RequestError, match=r"^callback: must be a function or None"):
        model.set_custom_progress_callback(3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^name: must be a name, a hub id or a path"):
        MusicGen.get_pretrained(3)  # type: ignore[arg-type]
    with pytest.raises(RequestError, match=r"^device: must be cpu, cuda"):
        MusicGen.get_pretrained("small", device="gpu")
    with pytest.raises(RequestError, match=r"^dtype must be one of"):
        MusicGen.get_pretrained("small", device="cpu", dtype="int4")


def test_a_melody_of_integers_in_an_array_gives_the_music_of_the_same_floats(melody_model: MusicGen) -> None:
    samples = (TONE.numpy() * 32768).astype(np.int16)
    melody_model.set_generation_params(use_sampling=False, duration=0.2, seed=0)
    given, wanted = (
        melody_model.generate_with_chroma(["a"], melody, rate, return_tokens=True)[1]  # type: ignore[arg-type]
        for melody, rate in (([samples], np.int64(RATE)), (torch.from_numpy(samples / 32768).float(), RATE))
    )
    assert torch.equal(given, wanted)
