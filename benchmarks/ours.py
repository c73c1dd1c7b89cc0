"""Our side: requests under way together in one decoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from benchmarks.weights import bytes_of, tensors_of
from handler.lm.attention import KVCache
from handler.lm.conditions import FusedConditions
from handler.lm.decoder import Decoder, Window
from handler.lm.static_step import decoder_for
from handler.musicgen import MusicGen
from handler.params import Clip, GenerationParams

PROMPT = "80s pop track with bassy drums and synth"


@dataclass(slots=True)
class Ours:
    """Our decoder with so many requests, all under way together."""

    model: MusicGen
    requests: int
    seconds: float
    decoder: Decoder | None = None
    cross_bytes: int = 0

    def begin(self) -> None:
        """Lets all requests in, which takes the first step of each."""
        windows = [self._window(seed) for seed in range(self.requests)]
        first = windows[0]
        rows = sum(window.rows for window in windows)
        sources = [group.cross.shape[1] for window in windows for group in window.conditions if group.cross is not None]
        self.decoder = decoder_for(
            self.model.lm,
            self.requests,
            rows,
            first.positions,
            first.sequence.shape[1],
            max(sources, default=0),
            self.model.fuser.adds,
        )
        self.cross_bytes = bytes_of(
            tensors_of([self.model.lm.cross_keys_values(group) for window in windows for group in window.conditions])
        )
        for window in windows:
            self.decoder.join(window)

    def step(self) -> None:
        """One token of every codebook of every request."""
        assert self.decoder is not None
        self.decoder.step()

    def step_bytes(self) -> float:
        """Bytes that a step in the middle must read: weights once, cached keys and values of every row."""
        assert self.decoder is not None
        lm = self.model.lm
        window = self.decoder.slots[0].window
        prefix = window.positions + 1 - window.sequence.shape[1]
        position = prefix + round(self.seconds * self.model.frame_rate / 2)
        past = KVCache.row_bytes(lm.config, position, lm.device, lm.dtype) * self.requests * window.rows
        return bytes_of(self.step_weights()) + past + self.cross_bytes

    def step_weights(self) -> list[Tensor]:
        """The weights that a step reads.

        Of cross-attention only the queries' and the output's are, its keys and values being cached; of the embeddings a
        few rows.
        """
        return tensors_of(self.model.lm, without=("_kv_proj", "_embeddings", "_first_embedding", "null_value"))

    def conditions(self) -> FusedConditions:
        """Those of the first request's rows."""
        return self._window(0).conditions[0]

    def logits(self, sequence: Tensor, conditions: FusedConditions) -> Tensor:
        """Of a whole sequence `[K, S]`, float32 `[R, S, K, card]`."""
        lm = self.model.lm
        out = lm(sequence[None].to(lm.device), conditions)  # [R, S, dim]
        return lm.logits(out.flatten(0, 1)).unflatten(0, out.shape[:2])

    def _window(self, seed: int) -> Window:
        # A second more than is measured, so that no request ends before the others.
        params = GenerationParams(duration=self.seconds + 1.0, seed=seed)
        window = self.model.start(Clip(PROMPT), params).next_window()
        assert window is not None
        return window
