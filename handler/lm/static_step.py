"""The decode step with everything at fixed addresses, so that on a GPU it is one replay of a captured CUDA graph.

Positions, steps, lengths and sampling settings live on the device and advance there; sampling is part of the step. The
host only writes which rows take part, when that changes, and waits for the device only where frames are handed out.
"""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from functools import partial

import torch
from torch import Tensor

from handler.lm.attention import CrossKV, KVCache
from handler.lm.conditions import FusedConditions
from handler.lm.cpu_step import CpuDecoder
from handler.lm.decode_attention import AttentionKernel, CrossCache, StaticAttention, attention_kernel
from handler.lm.decoder import UNKNOWN, Decoder, Slot, Window, not_finite
from handler.lm.fused_step import FusedStep, fused_step
from handler.lm.graphs import Addresses, CudaCapture, Run
from handler.lm.model import LanguageModel
from handler.lm.sampling import draw, guide
from handler.lm.step_state import Plan, RequestSettings, StepState

logger = logging.getLogger(__name__)


class StaticDecoder(Decoder):
    """A `Decoder` whose step is captured once for each of a few numbers of rows (buckets), and replayed.

    A bucket's free places are filled with a free row of the cache and a request of nobody's, so they disturb nobody.
    Any rows can stand in a bucket: the step finds them by index.

    With `deterministic` every step runs the one full bucket, so the kernels are the same whoever else is there, and a
    request has the same bits. Its price: a step of one request takes as long as a full one. Up to 16 rows that is
    little, as reading the weights dominates; beyond, each row costs its share of the products. Without it each step
    runs the smallest bucket that holds its rows, and the last bits of a request's logits depend on the number of
    rows, which changes a draw in about one 30 s clip in a hundred in float32, and in more in float16.

    Args:
        lm: the language model.
        requests, rows, positions, steps: as `Decoder`.
        condition_length: the longest cross-attention source; `[layers, rows, H, condition_length, head_dim]` keys and
            values are claimed for it.
        additive: whether conditions are added to the embedded codes (a fuser's `sum`, `input_interpolate`).
        deterministic: only the full bucket.
        cuda_graphs: capture the step; on a CPU it never is.
        kernel: how attention is computed; None is the best there is for the device.
        fused: how steps of few rows are computed; None is the best there is for the device and the model.

    Raises:
        RuntimeError: when stepping after a tensor was replaced that the graphs were captured with.
    """

    def __init__(
        self,
        lm: LanguageModel,
        requests: int,
        rows: int,
        positions: int,
        steps: int,
        condition_length: int,
        additive: bool = False,
        deterministic: bool = True,
        cuda_graphs: bool = True,
        kernel: AttentionKernel | None = None,
        fused: FusedStep | None = None,
    ) -> None:
        device, config = lm.device, lm.config
        cache = KVCache(config, rows, positions, device, lm.dtype)
        cross: CrossCache | None = None
        if config.cross_attention:
            shape = (config.num_layers, rows, config.num_heads, condition_length, config.head_dim)
            cross = CrossCache(
                keys=torch.zeros(shape, device=device, dtype=cache.keys.dtype),
                values=torch.zeros(shape, device=device, dtype=cache.keys.dtype),
                lengths=torch.zeros(rows, dtype=torch.long, device=device),
                null_values=torch.stack(lm.null_values()),
            )
        self.state = state = StepState(
            sequences=torch.zeros(requests + 1, lm.num_codebooks, steps, dtype=torch.long, device=device),
            draws=torch.zeros(requests + 1, steps, lm.num_codebooks, device=device),
            cache=cache,
            offsets=torch.zeros(rows, dtype=torch.long, device=device),
            cross=cross,
            additive=torch.zeros(rows, steps, config.dim, device=device, dtype=lm.dtype) if additive else None,
            settings=RequestSettings(requests + 1, lm.card, device),
            plan=Plan(rows, requests, device),
        )
        super().__init__(
            lm,
            cache,
            state.sequences[:requests],
            state.draws[:requests],
            condition_length,
            state.settings.diverged[:requests],
        )
        self.buckets = [rows] if deterministic else bucket_sizes(rows)
        self._running: list[Slot] = []  # those the plan holds
        self._addresses = Addresses(self._written())
        # Triton launches on the current device, whatever device its tensors are on.
        self._on_device: AbstractContextManager[None] = (
            torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        )
        with self._on_device, torch.inference_mode():
            kernel = attention_kernel(device, lm.dtype) if kernel is None else kernel
            fused = fused_step(lm, kernel) if fused is None else fused
            capture = CudaCapture(device) if cuda_graphs and device.type == "cuda" else None
            self._steps = {bucket: self._prepared(bucket, kernel, fused, capture) for bucket in self.buckets}

    def _prepared(
        self, bucket: int, kernel: AttentionKernel, fused: FusedStep | None, capture: CudaCapture | None
    ) -> Run:
        """The step of a bucket: fused if it has few rows and that can be captured, else plain."""
        if fused is not None and bucket <= fused.most_rows:
            run = fused.bound_to(self.state, bucket)
            try:
                if capture is not None:
                    return capture(run)
                run()  # what does not fit this GPU shows now, and not in a request
                return run
            except Exception:
                logger.exception("the fused decode step of %d rows cannot be used; the plain one takes longer", bucket)
        plain = partial(plain_step, self.lm, kernel, self.state, bucket)
        return plain if capture is None else capture(plain)

    def join(self, window: Window) -> Slot:
        """Prefills a window and samples its first token; see `Decoder`."""
        slot = super().join(window)
        self.state.settings.write(slot)
        return slot

    def step(self) -> None:
        """Generates one more token of every codebook of every window that is not done; does not wait for it."""
        active = [slot for slot in self.slots if not slot.done]
        if not active:
            return
        if [id(slot) for slot in active] != [id(slot) for slot in self._running]:
            self._addresses.check(self._written())
            self.state.plan.write(active)
            self._running = active
        rows = sum(len(slot.rows) for slot in active)
        with self._on_device:
            self._steps[next(bucket for bucket in self.buckets if bucket >= rows)]()
        for slot in active:
            slot.step += 1

    def leave(self, slot: Slot) -> Tensor:
        """Frees a window's rows and gives its sequence, int64 `[K, S]`."""
        self.state.clear(slot)
        return super().leave(slot)

    def _check(self, group: FusedConditions) -> None:
        super()._check(group)
        if (group.additive is None) != (self.state.additive is None):
            raise ValueError("`additive` must say whether the model adds conditions to the embedded codes")

    def _take_in(self, first_row: int, group: FusedConditions, cross: CrossKV | None) -> None:
        self.state.write(first_row, group, cross)

    def _written(self) -> dict[str, Tensor]:
        """What is written between steps, by name."""
        cache = self.cache
        return {
            "sequences": self.sequences,
            "draws": self.draws,
            "cache.keys": cache.keys,
            "cache.values": cache.values,
        }


def decoder_for(
    lm: LanguageModel,
    requests: int,
    rows: int,
    positions: int,
    steps: int,
    condition_length: int,
    additive: bool = False,
    deterministic: bool = True,
    cuda_graphs: bool = True,
) -> Decoder:
    """The decoder for the model's device; the arguments are those of `StaticDecoder`."""
    if lm.device.type != "cuda":
        return CpuDecoder(lm, requests, rows, positions, steps, condition_length)
    return StaticDecoder(lm, requests, rows, positions, steps, condition_length, additive, deterministic, cuda_graphs)


def bucket_sizes(rows: int) -> list[int]:
    """2, 4, 8, … and the number of rows itself."""
    return [*(2**i for i in range(1, rows.bit_length()) if 2**i < rows), rows]


def plain_step(lm: LanguageModel, kernel: AttentionKernel, state: StepState, bucket: int) -> None:
    """One step of the first `bucket` vectors of the plan, for any model and any number of rows.

    It looks at no value on the host, so it can be captured.
    """
    plan, settings = state.plan, state.settings
    rows, request_of = plan.rows[:bucket], plan.request_of[:bucket]  # [N]
    step = settings.step[request_of]  # [N]
    tokens = state.sequences[request_of, :, step]  # [N, K]
    additive = None if state.additive is None else state.additive[rows, step]  # [N, dim]
    positions = state.offsets[rows] + step  # [N]
    attention = StaticAttention(lm.config, kernel, state.cache.keys, state.cache.values, state.cross, rows, positions)
    logits = lm.step(tokens, additive, attention)  # [N, K, card]

    index = plan.requests[:bucket]  # [B]
    conditional, wav_only, null = plan.places[:, :bucket]
    coef, beta = settings.coef[index, None, None], settings.beta[index, None, None]
    guided = guide(logits[conditional], logits[wav_only], logits[null], coef, beta)  # [B, K, card]
    settings.diverged[index] |= not_finite(guided)
    following = torch.minimum(settings.step[index] + 1, settings.last_step[index])  # [B]
    drawn = sample(guided, settings, index, state.draws[index, following])  # [B, K]
    known = state.sequences[index, :, following]  # [B, K]
    state.sequences[index, :, following] = torch.where(known == UNKNOWN, drawn, known)
    settings.step[index] = following


def sample(logits: Tensor, settings: RequestSettings, index: Tensor, uniform: Tensor) -> Tensor:
    """Draws one token for each codebook, as `handler.lm.decoder.sample`, whatever the settings hold.

    Args:
        logits: guided logits, float32 `[B, K, card]`.
        settings: of all requests.
        index: int64 `[B]`, whose the logits are.
        uniform: `[B, K]` in [0, 1).

    Returns:
        int64 `[B, K]`.
    """
    weights = (logits / settings.temperature[index, None, None]).softmax(dim=-1)  # [B, K, card]
    ordered, order = weights.sort(dim=-1, descending=True, stable=True)  # [B, K, card]
    last = (settings.top_k[index] - 1)[:, None, None].expand(-1, logits.shape[1], 1)
    top_p = settings.top_p[index, None, None]
    kept = torch.where(top_p > 0.0, ordered.cumsum(dim=-1) - ordered <= top_p, ordered >= ordered.gather(-1, last))
    keep = torch.empty_like(kept).scatter_(-1, order, kept)
    return torch.where(settings.greedy[index, None], logits.argmax(dim=-1), draw(weights * keep, uniform))
