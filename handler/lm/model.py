"""The language model: codes in, logits of the next codes out, under conditions."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from handler.linear import Linear
from handler.lm.attention import CrossKV, KVCache, PrefillAttention
from handler.lm.block_attention import BlockCache
from handler.lm.conditions import FusedConditions
from handler.lm.patterns import PatternProvider
from handler.lm.transformer import (
    Attention,
    CrossAttention,
    LayerNorm,
    Projection,
    SelfAttention,
    Transformer,
    TransformerConfig,
    computed_in,
    lay_out,
)


class LanguageModel(nn.Module):
    """A transformer over several streams of codes (MusicGen paper, section 2).

    Built on the meta device, it takes its parameters by `load_state_dict(assign=True)` under the names of the
    checkpoint; `finalize` then lays them out for a device, after which the model can run and is never changed again.

    Args:
        config: the transformer's.
        num_codebooks: K (`n_q`).
        card: codes of one codebook; the special token is `card` itself.
        bias_proj: whether the output projections have a bias.
        pattern_provider: the layout of the codes.
    """

    def __init__(
        self,
        config: TransformerConfig,
        num_codebooks: int,
        card: int,
        bias_proj: bool,
        pattern_provider: PatternProvider,
    ) -> None:
        super().__init__()
        self.config = config
        self.num_codebooks = num_codebooks
        self.card = card
        self.pattern_provider = pattern_provider
        self.emb = nn.ModuleList(nn.Embedding(card + 1, config.dim) for _ in range(num_codebooks))
        self.transformer = Transformer(config)
        self.out_norm = LayerNorm(config.dim, eps=1e-5) if config.norm_first else None
        self.linears = nn.ModuleList(_Head(config.dim, card, bias_proj) for _ in range(num_codebooks))
        self.device: torch.device
        self.dtype: torch.dtype
        self.weight_dtype: torch.dtype
        self._embeddings: Tensor
        self._first_embedding: Tensor
        self._heads: Linear

    @property
    def special_token(self) -> int:
        """Stands where the pattern holds no code."""
        return self.card

    def finalize(
        self,
        device: torch.device,
        dtype: torch.dtype,
        after_each: Callable[[], None] = lambda: None,
        check: Callable[[str, Tensor], None] = lambda name, parameter: None,
    ) -> None:
        """Lays the parameters out for `device`, the weights in `dtype`; rotary frequencies stay float32.

        int8 is for a CPU alone: the weights of all products are rounded to 8 bits, and the rest is float32.

        Each parameter is converted, then dropped, before the next: the peak is the model and one parameter more for
        each thread.

        Args:
            device, dtype: of the model from now on.
            after_each: called when some parameters are no longer needed.
            check: called with each parameter and its name just before it is converted, when it is read anyway; it may
                raise, and is called from several threads.
        """
        self.device, self.weight_dtype, self.dtype = device, dtype, computed_in(dtype)
        modules = dict(self.named_modules())
        parts: dict[str, SelfAttention | CrossAttention | Projection] = {
            name: module for name, module in modules.items() if isinstance(module, SelfAttention | CrossAttention)
        }
        parts |= {
            name: module
            for name, module in modules.items()
            if isinstance(module, Projection) and name.rpartition(".")[0] not in parts
        }

        def check_all(name: str, module: nn.Module) -> None:
            for key, parameter in module.state_dict(prefix=name).items():
                check(key, parameter)

        def finalize(name: str, part: SelfAttention | CrossAttention | Projection) -> None:
            check_all(f"{name}.", part)
            part.finalize(device, dtype)

        def finalize_heads() -> None:
            check_all("linears.", self.linears)
            self._finalize_heads()

        # Packing for a CPU uses one core, and most of the time that loading takes; so the longest begins.
        with ThreadPoolExecutor(torch.get_num_threads() if device.type == "cpu" else 1) as pool:
            packing = [
                pool.submit(finalize_heads),
                *(pool.submit(finalize, name, part) for name, part in parts.items()),
            ]
            for packed in packing:
                packed.result()
                after_each()
        check_all("", self)  # the others
        tables = [e.weight.detach().to(device, self.dtype) for e in self.emb if isinstance(e, nn.Embedding)]
        self._embeddings = torch.cat(tables)  # [K * (card + 1), dim]
        self._first_embedding = torch.arange(self.num_codebooks, device=device) * (self.card + 1)  # [K]
        del self.emb
        for parameter in self.parameters():
            parameter.data = parameter.data.to(device, self.dtype)
            parameter.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, LayerNorm):
                module.finalize()
        if self.transformer.rope is not None:
            self.transformer.rope.to(device, torch.float32)

    def _finalize_heads(self) -> None:
        heads = [head for head in self.linears if isinstance(head, _Head)]
        weight = torch.cat([head.weight.detach() for head in heads])  # [K * card, dim]
        biases = [head.bias.detach() for head in heads if head.bias is not None]
        self._heads = lay_out(weight, torch.cat(biases) if biases else None, self.device, self.weight_dtype)
        del self.linears

    def embed(self, tokens: Tensor) -> Tensor:
        """Tokens `[N, K]` -> the sum of their embeddings `[N, dim]`, the special token's included."""
        return F.embedding(tokens + self._first_embedding, self._embeddings).sum(dim=1)

    def logits(self, x: Tensor) -> Tensor:
        """The transformer's output `[N, dim]` -> logits float32 `[N, K, card]`."""
        if self.out_norm is not None:
            x = self.out_norm(x)
        return self._heads(x).float().unflatten(-1, (self.num_codebooks, self.card))

    def cross_keys_values(self, conditions: FusedConditions) -> CrossKV | None:
        """For each layer the keys and values of the condition, computed once for a request."""
        if conditions.cross is None:
            return None
        source = conditions.cross.to(self.device, self.dtype)
        dtype = KVCache.dtype_on(self.config, self.device, self.dtype)
        pairs = [layer.keys_values(source) for layer in self._cross_attentions()]
        return [(k.to(dtype), v.to(dtype)) for k, v in pairs]

    def null_values(self) -> list[Tensor]:
        """For each layer what cross-attention gives for a null condition, `[H, head_dim]`."""
        return [layer.null_value for layer in self._cross_attentions()]

    def forward(
        self,
        sequence: Tensor,
        conditions: FusedConditions,
        cross: CrossKV | None = None,
        cache: KVCache | BlockCache | None = None,
        first_row: int = 0,
    ) -> Tensor:
        """Runs whole sequences, each vector seeing those before it.

        Args:
            sequence: int64 `[1 or R, K, S]`, the codes in their pattern; one sequence serves all R rows.
            conditions: of R rows.
            cross: `cross_keys_values(conditions)`, where already computed.
            cache, first_row: where to leave keys and values for decode steps.

        Returns:
            The transformer's output at the S steps, `[R, S, dim]`; `logits` makes logits of it.
        """
        rows, steps = conditions.rows, sequence.shape[-1]
        tokens = sequence.expand(rows, -1, -1).transpose(1, 2).flatten(0, 1)  # [R * S, K]
        x = self.embed(tokens).unflatten(0, (rows, steps))  # [R, S, dim]
        if conditions.additive is not None:
            x = x + conditions.additive[:, :steps].to(x)
        x = torch.cat([conditions.prefix.to(x), x], dim=1)  # [R, P + S, dim]
        length = x.shape[1]
        attention = PrefillAttention(
            self.config,
            rows,
            length,
            self.device,
            self.dtype,
            cross=self.cross_keys_values(conditions) if cross is None else cross,
            null_values=self.null_values(),
            cache=cache,
            first_row=first_row,
        )
        return self.transformer(x.flatten(0, 1), attention).unflatten(0, (rows, length))[:, -steps:]

    def step(self, tokens: Tensor, additive: Tensor | None, attention: Attention) -> Tensor:
        """One decode step: tokens `[N, K]` of N rows -> logits `[N, K, card]` of what follows."""
        x = self.embed(tokens)  # [N, dim]
        if additive is not None:
            x = x + additive
        return self.logits(self.transformer(x, attention))

    def _cross_attentions(self) -> list[CrossAttention]:
        layers = [layer.cross_attention for layer in self.transformer.layers]
        return [layer for layer in layers if isinstance(layer, CrossAttention)]


class _Head(nn.Module):
    """The parameters of one codebook's output projection, until all are joined into one product."""

    def __init__(self, dim: int, card: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(card, dim))
        self.bias = nn.Parameter(torch.empty(card)) if bias else None
