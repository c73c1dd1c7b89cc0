"""Codebook patterns: how `[K, T]` codes are laid out as the sequence the language model reads.

A pattern places each code (codebook k, frame t) at one sequence step; all other places hold the special token.
Five layouts are known, by the names of the config key `codebooks_pattern.modeling` (MusicGen paper, section 2.1).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from handler.errors import CheckpointError

Layout = list[list[tuple[int, int]]]
"""For each sequence step the (frame, codebook) pairs it holds. Step 0 is empty: the model starts from nothing."""


class Pattern:
    """One layout for a given number of frames.

    Attributes:
        step_of: int64 `[K, T]`, the sequence step that holds codebook k of frame t.
        num_steps: S, the length of the whole sequence, its leading all-special step included.
        num_valid_steps: S without the last steps, in which some codebooks are past the end.
    """

    def __init__(self, layout: Layout, num_codebooks: int, num_frames: int) -> None:
        step_of = [[0] * num_frames for _ in range(num_codebooks)]
        last_frame = 0
        for step, coordinates in enumerate(layout):
            for frame, codebook in coordinates:
                last_frame = max(last_frame, frame + 1)
                if frame < num_frames:
                    step_of[codebook][frame] = step
        self.step_of = torch.tensor(step_of, dtype=torch.long)  # [K, T]
        # The frames that are whole once each step is generated: all their codebooks, and all frames before them.
        last_steps = self.step_of.amax(dim=0).cummax(dim=0).values  # [T]
        self._frames_ready = torch.searchsorted(last_steps, torch.arange(len(layout)), right=True).tolist()
        self.num_steps = len(layout)
        self.num_valid_steps = len(layout) - (last_frame - num_frames)

    def build(self, codes: Tensor, special_token: int, only_valid_steps: bool = False) -> tuple[Tensor, Tensor]:
        """Lays codes out as a sequence.

        Args:
            codes: integer `[B, K, T]`; T may be less than the pattern's number of frames.
            special_token: fills every place that holds no code.
            only_valid_steps: cut the last steps, in which some codebooks are past the end.

        Returns:
            The sequence `[B, K, S]`, and the bool mask `[K, S]` of the places that hold a code.
        """
        batch, num_codebooks, num_frames = codes.shape
        num_steps = self.num_valid_steps if only_valid_steps else self.num_steps
        step_of = self.step_of[:, :num_frames]
        sequence = codes.new_full((batch, num_codebooks, self.num_steps), special_token)  # [B, K, S]
        sequence.scatter_(2, step_of.to(codes.device).expand(batch, -1, -1), codes)
        mask = torch.zeros(num_codebooks, self.num_steps, dtype=torch.bool)  # [K, S]
        mask.scatter_(1, step_of, True)
        return sequence[..., :num_steps], mask[:, :num_steps]

    def revert(self, sequence: Tensor, fill: int) -> tuple[Tensor, Tensor]:
        """Reads the codes back from a sequence.

        Args:
            sequence: integer `[B, K, S']`, possibly shorter than the whole sequence.
            fill: stands for codes whose step the sequence does not reach.

        Returns:
            The codes `[B, K, T]`, and the bool mask `[K, T]` of the codes the sequence holds.
        """
        codes, reached = self._gather(sequence.unsqueeze(-1), self.step_of, self.step_of < sequence.shape[2], fill)
        return codes.squeeze(-1), reached

    def revert_logits(self, logits: Tensor, only_valid_steps: bool = False) -> tuple[Tensor, Tensor]:
        """Aligns the logits of each sequence step with the codes they predict, those of the step after.

        Args:
            logits: float `[B, K, S', card]`.
            only_valid_steps: leave out the codes of the steps that `build` cuts.

        Returns:
            Logits `[B, K, T, card]`, NaN where the sequence does not reach, and the bool mask `[K, T]`.
        """
        limit = self.num_valid_steps if only_valid_steps else self.num_steps
        reached = (self.step_of <= logits.shape[2]) & (self.step_of < limit)
        return self._gather(logits, self.step_of - 1, reached, float("nan"))

    def frames_ready(self, step: int) -> int:
        """The leading frames whose every codebook stands at this sequence step or before."""
        return self._frames_ready[step]

    def first_step_of(self, frame: int) -> int:
        """The first sequence step that holds any codebook of this frame."""
        return int(self.step_of[:, frame].min())

    @staticmethod
    def _gather(values: Tensor, steps: Tensor, reached: Tensor, fill: float) -> tuple[Tensor, Tensor]:
        batch, _, num_steps, width = values.shape
        index = steps.clamp(max=num_steps - 1).to(values.device)[None, :, :, None]
        gathered = values.gather(2, index.expand(batch, -1, -1, width))  # [B, K, T, width]
        gathered.masked_fill_(~reached.to(values.device)[None, :, :, None], fill)
        return gathered, reached


class PatternProvider:
    """Gives the pattern of a model for any number of frames.

    Args:
        num_codebooks: K.
        layout: the function from a number of frames to the layout.
    """

    def __init__(self, num_codebooks: int, layout: Callable[[int], Layout]) -> None:
        self.num_codebooks = num_codebooks
        self._layout = layout
        self.get = lru_cache(maxsize=128)(self._get)

    def _get(self, num_frames: int) -> Pattern:
        return Pattern(self._layout(num_frames), self.num_codebooks, num_frames)


def get_pattern_provider(name: str, num_codebooks: int, options: Mapping[str, Any]) -> PatternProvider:
    """The pattern that `codebooks_pattern.modeling` names, with the options under its own key.

    Raises:
        CheckpointError: for a name or an option nobody knows, or options that do not fit `num_codebooks`.
    """
    layouts: dict[str, Callable[..., Callable[[int], Layout]]] = {
        "parallel": _parallel,
        "delay": _delay,
        "unroll": _unroll,
        "coarse_first": _coarse_first,
        "valle": _coarse_first,  # its name in the first releases
        "musiclm": _musiclm,
    }
    key = f"codebooks_pattern.{name}"
    if name not in layouts:
        raise CheckpointError(f"codebooks_pattern.modeling is {name!r}; it must be one of {', '.join(layouts)}.")
    try:
        layout = layouts[name](num_codebooks, **{str(k): v for k, v in options.items()})
    except TypeError as error:
        raise CheckpointError(f"{key} holds an option this pattern does not have: {error}.") from error
    except ValueError as error:
        raise CheckpointError(f"{key}: {error}.") from error
    return PatternProvider(num_codebooks, layout)


def _ascending(name: str, values: Sequence[int] | None, default: list[int]) -> list[int]:
    if values is None:
        return default
    if len(values) != len(default) or sorted(values) != list(values):
        raise ValueError(f"{name} must be {len(default)} ascending numbers, not {list(values)}")
    return list(values)


def _delay(
    num_codebooks: int,
    delays: Sequence[int] | None = None,
    flatten_first: int = 0,
    empty_initial: int = 0,
) -> Callable[[int], Layout]:
    """Codebook k runs `delays[k]` steps behind; the first frames may be flattened, one code a step."""
    delays = _ascending("delays", delays, list(range(num_codebooks)))

    def layout(num_frames: int) -> Layout:
        steps: Layout = [[] for _ in range(1 + empty_initial)]
        steps += [[(t, k)] for t in range(min(num_frames, flatten_first)) for k in range(num_codebooks)]
        for t in range(flatten_first, num_frames + max(delays)):
            steps.append([(t - d, k) for k, d in enumerate(delays) if t - d >= flatten_first])
        return steps

    return layout


def _parallel(num_codebooks: int) -> Callable[[int], Layout]:
    """All codebooks of a frame in one step."""
    return _delay(num_codebooks, [0] * num_codebooks)


def _unroll(
    num_codebooks: int, flattening: Sequence[int] | None = None, delays: Sequence[int] | None = None
) -> Callable[[int], Layout]:
    """Each frame takes several inner steps: codebook k the `flattening[k]`-th, `delays[k]` frames late."""
    flattening = _ascending("flattening", flattening, list(range(num_codebooks)))
    delays = _ascending("delays", delays, [0] * num_codebooks)
    groups: dict[int, list[int]] = {}
    for k, inner in enumerate(flattening):
        groups.setdefault(inner, []).append(k)
    for inner, codebooks in groups.items():
        if len({delays[k] for k in codebooks}) > 1:
            raise ValueError(f"the codebooks of inner step {inner} must share one delay")

    def placed(num_frames: int) -> Iterator[tuple[int, list[tuple[int, int]]]]:
        end = num_frames + max(delays)
        for t in range(end):
            for inner in range(max(flattening) + 1):
                if inner not in groups:
                    yield t, []
                elif t + delays[groups[inner][0]] < end:
                    yield t + delays[groups[inner][0]], [(t, k) for k in groups[inner]]

    return lambda num_frames: [[]] + [coordinates for _, coordinates in sorted(placed(num_frames))]


def _coarse_first(num_codebooks: int, delays: Sequence[int] | None = None) -> Callable[[int], Layout]:
    """The whole first codebook, then the others, with delays between them (VALL-E)."""
    delays = _ascending("delays", delays, [0] * (num_codebooks - 1))

    def layout(num_frames: int) -> Layout:
        steps: Layout = [[]] + [[(t, 0)] for t in range(num_frames)]
        for t in range(num_frames + max(delays)):
            steps.append([(t - d, k + 1) for k, d in enumerate(delays) if t >= d])
        return steps

    return layout


def _musiclm(num_codebooks: int, group_by: int = 2) -> Callable[[int], Layout]:
    """Flattened, group of codebooks after group of codebooks (MusicLM)."""
    if num_codebooks % group_by:
        raise ValueError(f"group_by must divide the {num_codebooks} codebooks, not be {group_by}")

    def layout(num_frames: int) -> Layout:
        return [[]] + [
            [(t, k)]
            for first in range(0, num_codebooks, group_by)
            for t in range(num_frames)
            for k in range(first, first + group_by)
        ]

    return layout
