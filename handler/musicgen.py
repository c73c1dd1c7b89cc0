"""MusicGen: a loaded model and its offline API, with the names of audiocraft."""

from __future__ import annotations

import math
import os
import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from handler.arguments import as_batch, as_count, as_descriptions, as_melodies, as_rate
from handler.audio import convert_audio
from handler.builders import (
    build_compression_model,
    build_conditioners,
    build_fuser,
    build_language_model,
    check_parameter,
)
from handler.checkpoint import COMPRESSION_FILE, LM_FILE, Pointer, read_checkpoint
from handler.compression import CompressionModel
from handler.conditioners.base import WavInput
from handler.conditioners.fuser import Fuser
from handler.conditioners.provider import DESCRIPTION, SELF_WAV, ConditioningProvider, rows_of
from handler.conditioners.style import StyleConditioner
from handler.conditioners.t5 import T5Conditioner
from handler.errors import CheckpointError, ModelDivergedError, RequestError
from handler.generation import Generation
from handler.gpu import compute_exactly
from handler.linear import can_prepack
from handler.lm.conditions import FusedConditions
from handler.lm.decoder import Guidance, Slot
from handler.lm.model import LanguageModel
from handler.lm.static_step import decoder_for
from handler.lm.transformer import computed_in
from handler.params import STYLE_FIELDS, Clip, GenerationParams, as_number
from handler.quantized import can_quantize
from handler.registry import find_auxiliary, resolve

Audio = Tensor | NDArray[np.generic]
"""Audio as users have it; see `handler.arguments`."""

Callback = Callable[[int, int], None]
"""Called with the decode steps done and those to do; may raise to stop."""

_MUSICGEN_STRIDE = 18.0  # seconds; audiocraft's default of extend_stride
_AUDIOGEN_STRIDE = 2.0
_LOOK_STEPS = 50  # between two looks at whether the logits are still numbers, which wait for a GPU
_SHORT_MODEL_STRIDE = 0.6  # of max_duration, for models too short for the default


class MusicGen:
    """A loaded model. `get_pretrained` makes one.

    Every clip is what audiocraft would generate for it in a batch of one, however many are generated together.

    Args:
        compression_model, lm, conditioning, fuser: the parts.
        max_duration: seconds of one window (`dataset.segment_duration`).
        default_stride: seconds between windows where a request names none and the model is long enough.
    """

    def __init__(
        self,
        compression_model: CompressionModel,
        lm: LanguageModel,
        conditioning: ConditioningProvider,
        fuser: Fuser,
        max_duration: float,
        default_stride: float = _MUSICGEN_STRIDE,
    ) -> None:
        self.compression_model = compression_model
        self.lm = lm
        self.conditioning = conditioning
        self.fuser = fuser
        self.generation_params = GenerationParams()
        self._longest = max_duration
        self._max_duration = max_duration
        self._default_stride = default_stride
        self._progress_callback: Callback | None = None

    @classmethod
    def get_pretrained(
        cls,
        name: str | Path = "small",
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        hub_dir: str | Path | None = None,
        revision: str | None = None,
        token: str | None = None,
    ) -> MusicGen:
        """Loads a model.

        Args:
            name: a registry name (`small`), a hub id (`facebook/musicgen-small`), a folder with `state_dict.bin` and
                `compression_state_dict.bin`, or the language model's file, the other beside it.
            device: where to run; None is cuda where there is one, else cpu.
            dtype: of the language model, see `serving_dtype`; None is float16 on a GPU and float32 on a CPU.
            hub_dir: folder of auxiliary models (`t5-base`, …); None is `hub` in the checkpoint folder, then the hub.
            revision, token: for downloads from the hub.

        Raises:
            CheckpointError: if anything is missing, does not fit or is not finite; the message says what to do.
            RequestError: for a device or dtype that there is not.
        """
        if not isinstance(name, str | os.PathLike):
            raise RequestError("name", f"must be a name, a hub id or a path, not a {type(name).__name__}")
        device = serving_device(device)
        dtype = serving_dtype(dtype, device)
        if device.type == "cuda":
            compute_exactly()
        lm_file = Path(name)
        if not lm_file.is_file():
            lm_file = resolve(str(name), revision=revision, token=token) / LM_FILE
        folder = lm_file.parent

        def find(auxiliary: str) -> Path:
            return find_auxiliary(auxiliary, folder, hub_dir=None if hub_dir is None else Path(hub_dir))

        checkpoint = read_checkpoint(lm_file)
        if isinstance(checkpoint, Pointer):
            raise CheckpointError(f"{lm_file} is a compression model's pointer, not a language model.")
        config = checkpoint.config
        compression = build_compression_model(folder / COMPRESSION_FILE, config, find).to(device)
        lm = build_language_model(checkpoint)
        if (lm.num_codebooks, lm.card) != (compression.num_codebooks, compression.cardinality):
            raise CheckpointError(
                f"{lm_file} speaks {lm.num_codebooks} codebooks of {lm.card} codes, but {folder / COMPRESSION_FILE} "
                f"has {compression.num_codebooks} of {compression.cardinality}: they belong to different models."
            )
        conditioning = build_conditioners(checkpoint, find).to(device)
        lm.finalize(device, dtype, checkpoint.release, partial(check_parameter, checkpoint, computed_in(dtype)))
        max_duration = float(config.section("dataset").get("segment_duration", 30.0))
        stride = _AUDIOGEN_STRIDE if config.get("solver") == "audiogen" else _MUSICGEN_STRIDE
        return cls(compression, lm, conditioning, build_fuser(config), max_duration, stride)

    @property
    def sample_rate(self) -> int:
        """Of the generated audio, in Hz."""
        return self.compression_model.sample_rate

    @property
    def frame_rate(self) -> float:
        """Frames of codes a second."""
        return self.compression_model.frame_rate

    @property
    def audio_channels(self) -> int:
        """1 or 2."""
        return self.compression_model.channels

    @property
    def device(self) -> torch.device:
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the language model's weights."""
        return self.lm.weight_dtype

    @property
    def conditioners(self) -> tuple[str, ...]:
        """Their names, such as `("description", "self_wav")`."""
        return tuple(self.conditioning.conditioners)

    @property
    def max_duration(self) -> float:
        """Seconds of one window; longer music is made of several. May be lowered."""
        return self._max_duration

    @max_duration.setter
    def max_duration(self, seconds: float) -> None:
        given = as_number("max_duration", seconds)
        if not 0 < given <= self._longest:
            raise RequestError(
                "max_duration", f"must be above 0 and at most the model's {self._longest} s, not {given}"
            )
        self._max_duration = given

    @property
    def melody(self) -> str | None:
        """The kind of audio a clip's `melody` is: `chroma`, `style`, or None where the model takes none."""
        if SELF_WAV not in self.conditioning.wavs:
            return None
        return "chroma" if self.style is None else "style"

    @property
    def style(self) -> StyleConditioner | None:
        """The conditioner of a model that takes a style."""
        conditioner = self.conditioning.wavs.get(SELF_WAV)
        return conditioner if isinstance(conditioner, StyleConditioner) else None

    def prompt_tokens(self, description: str | None) -> int:
        """The tokens of a description, where T5 reads it; else 0."""
        conditioner = self.conditioning.texts.get(DESCRIPTION)
        return len(conditioner.token_ids(description)) if description and isinstance(conditioner, T5Conditioner) else 0

    def longest_prefix(self, max_prompt_tokens: int) -> int:
        """The most vectors that stand in front of the codes, for texts of at most so many tokens."""
        prepended = [name for name, method in self.fuser.method_of.items() if method == "prepend"]
        conditioners = self.conditioning.wavs
        return sum(conditioners[n].max_length if n in conditioners else max_prompt_tokens for n in prepended)

    def longest_condition(self, max_prompt_tokens: int) -> int:
        """The most vectors that cross-attention sees, for texts of at most so many tokens."""
        attended = [name for name, method in self.fuser.method_of.items() if method == "cross"]
        conditioners = self.conditioning.wavs
        return sum(conditioners[n].max_length if n in conditioners else max_prompt_tokens for n in attended)

    def set_generation_params(self, **params: Any) -> None:
        """Sets how the next calls generate; what is not given takes its default. See `GenerationParams`.

        Raises:
            TypeError: for a name it does not have.
            RequestError: for a value of another type or out of bounds.
        """
        kept = {field: getattr(self.generation_params, field) for field in STYLE_FIELDS}
        self.generation_params = GenerationParams(**{**kept, **params})

    def set_style_conditioner_params(
        self,
        eval_q: int = 3,
        excerpt_length: float = 3.0,
        ds_factor: int | None = None,
        encodec_n_q: int | None = None,
    ) -> None:
        """Sets how the next calls take in the style of an excerpt (style models).

        Args:
            eval_q: codebooks that describe the style; fewer leave more freedom.
            excerpt_length: seconds of the excerpt that are looked at.
            ds_factor: keep one in this many frames; None is the checkpoint's.
            encodec_n_q: codebooks of the excerpt, where EnCodec extracts the features; None is the checkpoint's.

        Raises:
            RequestError: if this model takes no style, or for a value out of bounds.
        """
        style = self.style
        if style is None:
            raise RequestError("eval_q", "this model takes no style; use a style model")
        params = replace(
            self.generation_params,
            eval_q=eval_q,
            excerpt_length=excerpt_length,
            ds_factor=ds_factor,
            encodec_n_q=encodec_n_q,
        )
        style.params_with(params.eval_q, params.excerpt_length, params.ds_factor, params.encodec_n_q)
        self.generation_params = params

    def set_custom_progress_callback(self, callback: Callback | None) -> None:
        """Sets what is called after each decode step, with the steps done and those to do; None is nothing.

        Raises:
            RequestError: it cannot be called.
        """
        if callback is not None and not callable(callback):
            raise RequestError("callback", f"must be a function or None, not a {type(callback).__name__}")
        self._progress_callback = callback

    def generate(
        self, descriptions: Sequence[str | None], progress: bool = False, return_tokens: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Music for each description.

        Args:
            descriptions: B texts; None or "" is none.
            progress: show a progress bar.
            return_tokens: return the codes too.

        Returns:
            float32 `[B, C, T]` at `sample_rate`, T = int(duration * frame_rate) * hop; with `return_tokens` also the
            codes, int64 `[B, K, frames]`.

        Raises:
            RequestError: for an argument of another type (a single text, too), out of bounds, or empty.
            ModelDivergedError: if what the model computes is not finite.
        """
        return self._generate([Clip(text) for text in as_descriptions(descriptions)], progress, return_tokens)

    def generate_unconditional(
        self, num_samples: int, progress: bool = False, return_tokens: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Music from nothing. With a seed set, sample i takes seed + i, or all would be the same.

        Returns:
            As `generate`.

        Raises:
            RequestError: unless `num_samples` is a whole number of at least 1.
        """
        return self._generate([Clip()] * as_count(num_samples, "num_samples"), progress, return_tokens, seed_step=1)

    def generate_with_chroma(
        self,
        descriptions: Sequence[str | None],
        melody_wavs: Audio | Sequence[Audio | None],
        melody_sample_rate: int,
        progress: bool = False,
        return_tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Music that follows melodies (melody models), or takes the style of excerpts (style models).

        Args:
            descriptions: B texts; None or "" is none.
            melody_wavs: B tensors or NumPy arrays `[C, T]`, or None for no melody; or one `[B, C, T]` or `[C, T]`.
                Floats have a full scale of 1, integers (int8, int16, int32, uint8) that of their type.
            melody_sample_rate: their rate, 1000 to 768000 Hz, a multiple of 25.
            progress, return_tokens: as `generate`.

        Returns:
            As `generate`.

        Raises:
            RequestError: if this model takes no melody, or for an argument of another type or shape, out of bounds,
                empty, or not finite.
        """
        texts, melodies = as_descriptions(descriptions), as_melodies(melody_wavs, "melody_wavs")
        rate = as_rate(melody_sample_rate, "melody_sample_rate")
        if len(melodies) != len(texts):
            raise RequestError("melody_wavs", f"there are {len(melodies)} for {len(texts)} descriptions")
        clips = [
            Clip(text, melody=melody, melody_sample_rate=rate) for text, melody in zip(texts, melodies, strict=True)
        ]
        return self._generate(clips, progress, return_tokens)

    def generate_continuation(
        self,
        prompt: Audio,
        prompt_sample_rate: int,
        descriptions: Sequence[str | None] | None = None,
        progress: bool = False,
        return_tokens: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Music that continues audio.

        Args:
            prompt: a tensor or NumPy array `[B, C, T]` or `[C, T]`, of the types of a melody.
            prompt_sample_rate: its rate, 1000 to 768000 Hz, a multiple of 25.
            descriptions: B texts, or None for none.
            progress, return_tokens: as `generate`.

        Returns:
            As `generate`; the audio begins with the prompt, as the compression model renders it.

        Raises:
            RequestError: if the prompt is not shorter than the duration asked for, or for an argument of another type
                or shape, out of bounds, empty, or not finite.
        """
        wavs, rate = as_batch(prompt, "prompt"), as_rate(prompt_sample_rate, "prompt_sample_rate")
        texts = [None] * len(wavs) if descriptions is None else as_descriptions(descriptions)
        if len(texts) != len(wavs):
            raise RequestError("prompt", f"there are {len(wavs)} for {len(texts)} descriptions")
        clips = [
            Clip(text, continuation=wav, continuation_sample_rate=rate) for text, wav in zip(texts, wavs, strict=True)
        ]
        return self._generate(clips, progress, return_tokens)

    @torch.inference_mode()
    def generate_clip(
        self, clip: Clip, params: GenerationParams, callback: Callback | None = None
    ) -> tuple[Tensor, Tensor]:
        """One clip; what the server runs.

        Args:
            clip: its inputs.
            params: how to generate; the seed must be there.
            callback: called after each decode step; may raise to stop.

        Returns:
            float32 `[C, T]` and its codes, int64 `[K, frames]`.

        Raises:
            RequestError: if the clip makes no sense for this model.
        """
        [codes] = self._run([self.start(clip, params)], callback)
        return self._decode(codes), codes

    def start(self, clip: Clip, params: GenerationParams) -> Generation:
        """Encodes a clip's conditions and prompt, ready for a decoder.

        Raises:
            RequestError: if the clip makes no sense for this model, or the seed is missing.
        """
        if params.seed is None:
            raise RequestError("seed", "is missing")
        num_frames = int(params.duration * self.frame_rate)
        if num_frames < 1:
            raise RequestError("duration", f"must hold at least one frame ({1 / self.frame_rate} s)")
        max_frames = int(self.max_duration * self.frame_rate)
        prompt_frames = self._prompt_frames(clip)
        if prompt_frames >= min(num_frames, max_frames):  # before it is encoded, which takes memory by its length
            raise RequestError(
                "continuation",
                f"is {prompt_frames / self.frame_rate:g} s long; it must be shorter than the duration asked for "
                f"({params.duration:g} s) and than the model's window ({self.max_duration:g} s)",
            )
        prompt = self._prompt_codes(clip)
        double = params.cfg_coef_beta is not None
        guided = double or params.cfg_coef != 1.0
        wav = self._wav_input(clip, params)
        extended = num_frames > max_frames

        def conditions_at(first_frame: int, steps: int) -> list[FusedConditions]:
            window_wav = self._recut(wav, first_frame) if wav is not None and extended else wav
            conditions = self.conditioning.encode(clip.description, window_wav)
            groups = rows_of(self.conditioning, conditions, guided, double, params.two_step_cfg)
            return [self.fuser.fuse(rows, steps) for rows in groups]

        return Generation(
            self.lm.pattern_provider,
            self.lm.special_token,
            prompt,
            num_frames,
            max_frames,
            self._stride_frames(params, max_frames, num_frames),
            conditions_at,
            Guidance(params.cfg_coef, 1.0 if params.cfg_coef_beta is None else params.cfg_coef_beta),
            params.sampling,
            params.seed,
        )

    def _stride_frames(self, params: GenerationParams, max_frames: int, num_frames: int) -> int:
        stride = params.extend_stride
        if stride is None:
            fits = self._default_stride < self.max_duration
            stride = self._default_stride if fits else _SHORT_MODEL_STRIDE * self.max_duration
        frames = int(stride * self.frame_rate)
        if num_frames > max_frames and not 1 <= frames < max_frames:
            raise RequestError(
                "extend_stride",
                f"must be at least one frame and less than the model's window of {self.max_duration:g} s, "
                f"not {stride:g}",
            )
        return frames

    def _wav_input(self, clip: Clip, params: GenerationParams) -> WavInput | None:
        """The audio a clip is conditioned on, brought to the model's rate and then to mono."""
        conditioner = self.conditioning.wavs.get(SELF_WAV)
        if self.style is None:
            for field in STYLE_FIELDS:
                if getattr(params, field) is not None:
                    raise RequestError(field, "this model takes no style; use a style model")
        if clip.melody is None:
            return None
        if conditioner is None:
            raise RequestError("melody", "this model takes no melody; use a melody or style model")
        if clip.melody_sample_rate is None or params.seed is None:
            raise RequestError("melody", "its sample rate is missing")
        wav = self._converted("melody", clip.melody, clip.melody_sample_rate)
        style = (getattr(params, field) for field in STYLE_FIELDS)
        wav_input = WavInput(wav.mean(dim=0), self.sample_rate, params.seed, *style)
        conditioner.check(wav_input)
        return wav_input

    def _converted(self, field: str, wav: Tensor, sample_rate: int) -> Tensor:
        """Audio `[C, T]` at the model's rate and with its channels, `[C', T']`."""
        converted = convert_audio(wav, sample_rate, self.sample_rate, self.audio_channels)
        if not converted.shape[-1]:
            raise RequestError(field, f"is shorter than one sample at the model's {self.sample_rate} Hz")
        return converted

    def _recut(self, wav: WavInput, first_frame: int) -> WavInput:
        """The audio of one window of several: from the window's own time on, repeated to fill `max_duration`."""
        first = int(first_frame / self.frame_rate * self.sample_rate)
        samples = torch.arange(first, first + int(self.max_duration * self.sample_rate))
        return replace(wav, wav=wav.wav[samples % len(wav.wav)])

    def _prompt_frames(self, clip: Clip) -> int:
        """The frames of the audio to continue; the last may be in part."""
        if clip.continuation is None or clip.continuation_sample_rate is None:
            return 0
        frames = clip.continuation.shape[-1] / clip.continuation_sample_rate * self.frame_rate
        return math.ceil(round(frames, 6))

    def _prompt_codes(self, clip: Clip) -> Tensor:
        """The codes of the audio to continue, int64 `[K, P]`."""
        if clip.continuation is None:
            return torch.zeros(self.lm.num_codebooks, 0, dtype=torch.long)
        if clip.continuation_sample_rate is None:
            raise RequestError("continuation", "its sample rate is missing")
        wav = self._converted("continuation", clip.continuation, clip.continuation_sample_rate)
        codes, scale = self.compression_model.encode(wav[None].to(self.device))
        if scale is not None:
            raise RequestError("continuation", "this model's compression model rescales audio, so it cannot continue")
        return codes[0].cpu()

    @torch.inference_mode()
    def _generate(
        self, clips: Sequence[Clip], progress: bool, return_tokens: bool, seed_step: int = 0
    ) -> Tensor | tuple[Tensor, Tensor]:
        if not clips:
            raise RequestError(None, "there is nothing to generate")
        params = self.generation_params
        generations = []
        for i, clip in enumerate(clips):
            seed = secrets.randbelow(2**53) if params.seed is None else (params.seed + i * seed_step) % 2**63
            generations.append(self.start(clip, replace(params, seed=seed)))
        with tqdm(total=sum(g.total_steps for g in generations), disable=not progress, unit="step") as bar:

            def report(done: int, total: int) -> None:
                bar.update(done - bar.n)
                if self._progress_callback is not None:
                    self._progress_callback(done, total)

            codes = self._run(generations, report)
        wav = torch.stack([self._decode(c) for c in codes])  # [B, C, T]
        return (wav, torch.stack(codes)) if return_tokens else wav

    def _run(self, generations: Sequence[Generation], callback: Callback | None) -> list[Tensor]:
        """Runs generations together to their ends; the codes of each, int64 `[K, frames]`."""
        # The first window of a generation is its longest, and all its windows have as many rows.
        joining = [(window, g) for g in generations if (window := g.next_window()) is not None]
        windows = [window for window, _ in joining]
        sources = [group.cross for window in windows for group in window.conditions if group.cross is not None]
        decoder = decoder_for(
            self.lm,
            len(windows),
            sum(window.rows for window in windows),
            max(window.positions for window in windows),
            max(window.sequence.shape[1] for window in windows),
            max((source.shape[1] for source in sources), default=0),
            self.fuser.adds,
        )
        running: list[tuple[Slot, Generation]] = []
        done, total = 0, sum(generation.total_steps for generation in generations)
        while joining or running:
            if joining:
                window, generation = joining.pop(0)
                running.append((decoder.join(window), generation))
                done += 1
            else:
                decoder.step()
                done += len(running)
            for slot, generation in [pair for pair in running if pair[0].done or pair[0].step % _LOOK_STEPS == 0]:
                decoder.require_finite(slot)
                if not slot.done:
                    continue
                running.remove((slot, generation))
                generation.accept(decoder.leave(slot))
                following = generation.next_window()
                if following is not None:
                    joining.append((following, generation))
            if callback is not None:
                callback(done, total)
        return [generation.codes for generation in generations]

    def _decode(self, codes: Tensor) -> Tensor:
        """Codes `[K, frames]` -> float32 `[C, T]` on the CPU."""
        wav = self.compression_model.decode(codes[None].to(self.device))[0].cpu()
        require_finite_audio(wav)
        return wav


def require_finite_audio(wav: Tensor) -> None:
    """Raises ModelDivergedError for audio `[C, T]` on the CPU that holds anything but numbers."""
    if not bool(wav.sum().isfinite()):  # a sum leaves no NaN and no infinity out
        raise ModelDivergedError(
            "the model diverged: its codec made audio that is not finite (NaN or infinity), so there is no music to "
            "return. Serve another codec, or an earlier checkpoint of this one."
        )


def serving_device(device: str | torch.device | None) -> torch.device:
    """The device to run on: the one asked for, else cuda where there is one; of GPUs always which one.

    Raises:
        RequestError: for a name that is no device.
    """
    try:
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except (RuntimeError, TypeError) as error:
        raise RequestError("device", f"must be cpu, cuda or cuda:0 and so on, not {device!r}") from error
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


def serving_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype of the language model's weights: the one asked for, else float16 on a GPU and float32 on a CPU.

    Raises:
        RequestError: for one that is not served. int8 is for a CPU with VNNI; float16 is not for a CPU: products in it
            are slow there, and their bits depend on who else runs, while float32 keeps its weights in float16 anyway.
    """
    choices = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "int8": torch.int8}
    del choices["float16" if device.type == "cpu" else "int8"]
    if dtype is None:
        return torch.float32 if device.type == "cpu" else torch.float16
    named = choices.get(dtype) if isinstance(dtype, str) else dtype
    if named is None or named not in choices.values():
        raise RequestError(None, f"dtype must be one of {', '.join(choices)} on {device.type}, not {dtype}")
    if named is torch.int8 and not can_quantize():
        other = "bfloat16 or float32" if can_prepack(torch.bfloat16) else "float32"
        message = f"this CPU cannot multiply 8-bit integers exactly (x86 with VNNI can); set dtype to {other}"
        raise RequestError(None, message)
    return named
