"""The tensors a model is made of, wherever its objects keep them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from handler.half import HalfLinear
from handler.quantized import QuantizedLinear

_PACKED = {HalfLinear: torch.float16, QuantizedLinear: torch.int8}


def tensors_of(root: object, without: Iterable[str] = ()) -> list[Tensor]:
    """Every tensor that an object of ours, or a module, reaches through its attributes, each once.

    Prepacked weights are no parameters, so `nn.Module.parameters` would miss them; of those whose layout torch hides,
    there is a tensor of their shape and dtype without values.

    Args:
        root: a module, an object of the package `handler`, or a container of them.
        without: names of attributes not to follow.
    """
    found: dict[int, Tensor] = {}
    seen: set[int] = set()
    for tensor in _walk(root, frozenset(without), seen):
        found[id(tensor)] = tensor
    return list(found.values())


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Of all of them."""
    return sum(tensor.numel() * tensor.itemsize for tensor in tensors)


def _walk(value: Any, without: frozenset[str], seen: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in seen:
        seen.add(id(value))
        if type(value) in _PACKED:  # torch keeps these weights in objects of its own
            yield torch.empty(value.out_features, value.in_features, dtype=_PACKED[type(value)], device="meta")
        for part in _parts(value, without):
            yield from _walk(part, without, seen)


def _parts(value: Any, without: frozenset[str]) -> list[Any]:
    if isinstance(value, dict):
        return [part for name, part in value.items() if name not in without]
    if isinstance(value, list | tuple):
        return list(value)
    if isinstance(value, nn.Module) or type(value).__module__.startswith("handler."):
        return _parts(getattr(value, "__dict__", {}), without)
    return []
