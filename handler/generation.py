"""One request from its prompt to its last frame: its windows, one after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from handler.lm.conditions import FusedConditions
from handler.lm.decoder import UNKNOWN, Guidance, Window
from handler.lm.patterns import Pattern, PatternProvider
from handler.lm.sampling import Sampling, uniform_draws

ConditionsAt = Callable[[int, int], Sequence[FusedConditions]]
"""From the first frame of a window and its number of steps to the conditions of the request's rows."""


class Generation:
    """The state of one request, between windows.

    Longer music than the model's own context is made in windows of `max_frames`; each begins `stride` frames after
    the one before, and continues its last frames (audiocraft's extended generation).

    Args:
        patterns: of the language model.
        special_token: of the language model.
        prompt: int64 `[K, P]`, the codes to continue; P may be 0 and is less than the frames of the first window.
        num_frames: of the whole result, the prompt included.
        max_frames: of one window.
        stride: frames between the beginnings of two windows, 1 to `max_frames` - 1.
        conditions: of the request's rows.
        guidance, sampling: what makes a token of the rows' logits.
        seed: of the request's draws. Draw n of codebook k is the same whatever else the request asks for.
    """

    def __init__(
        self,
        patterns: PatternProvider,
        special_token: int,
        prompt: Tensor,
        num_frames: int,
        max_frames: int,
        stride: int,
        conditions: ConditionsAt,
        guidance: Guidance,
        sampling: Sampling,
        seed: int,
    ) -> None:
        self.patterns, self.special_token = patterns, special_token
        self.num_frames, self.max_frames, self.stride = num_frames, max_frames, stride
        self.conditions, self.guidance, self.sampling = conditions, guidance, sampling
        self.codes = prompt  # [K, frames so far]
        self._first_frame = 0  # of the window under way
        spans = self._spans(prompt.shape[1])
        self.total_steps = sum(num_steps - start for num_steps, start in spans)
        self._draws = uniform_draws(seed, self.total_steps, patterns.num_codebooks)

    def _spans(self, prompt_frames: int) -> list[tuple[int, int]]:
        """For each window its number of steps and the first it samples."""
        spans, first_frame, known = [], 0, prompt_frames
        while known < self.num_frames:
            frames = min(self.num_frames - first_frame, self.max_frames)
            pattern = self.patterns.get(frames)
            spans.append((pattern.num_steps, pattern.first_step_of(known - first_frame)))
            known, first_frame = first_frame + frames, first_frame + self.stride
        return spans

    @property
    def finished(self) -> bool:
        """Whether all frames are there."""
        return self.codes.shape[1] >= self.num_frames

    def next_window(self) -> Window | None:
        """The next window to generate, or None when all frames are there."""
        if self.finished:
            return None
        known = self.codes.shape[1]
        pattern, frames = self._pattern, self._window_frames
        prompt = self.codes[:, self._first_frame :]  # [K, known frames of the window]
        codes = torch.full((1, len(prompt), frames), UNKNOWN)  # [1, K, frames]
        codes[0, :, : prompt.shape[1]] = prompt
        sequence, _ = pattern.build(codes, self.special_token)
        start = pattern.first_step_of(known - self._first_frame)
        steps = pattern.num_steps - start
        draws, self._draws = self._draws[:steps], self._draws[steps:]
        conditions = self.conditions(self._first_frame, pattern.num_steps)
        return Window(sequence[0], start, conditions, self.guidance, self.sampling, draws)

    def frames_ready(self, step: int) -> int:
        """The frames that are final once the window under way has its token of this step."""
        return self._first_frame + self._pattern.frames_ready(step)

    def read(self, sequence: Tensor, first: int, last: int) -> Tensor:
        """Frames `first` to `last` of the music, of the sequence `[K, S]` under way; int64 `[K, last - first]`."""
        frames = slice(first - self._first_frame, last - self._first_frame)
        return sequence.gather(1, self._pattern.step_of[:, frames].to(sequence.device)).cpu()

    def accept(self, sequence: Tensor) -> None:
        """Takes a finished window's sequence, int64 `[K, S]`."""
        codes, _ = self._pattern.revert(sequence[None].cpu(), UNKNOWN)
        self.codes = torch.cat([self.codes[:, : self._first_frame], codes[0]], dim=1)
        self._first_frame += self.stride

    @property
    def _window_frames(self) -> int:
        return min(self.num_frames - self._first_frame, self.max_frames)

    @property
    def _pattern(self) -> Pattern:
        return self.patterns.get(self._window_frames)
