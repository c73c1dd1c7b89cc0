"""From a checkpoint's tensors to a model's parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from handler.errors import CheckpointError
from handler.finite import require_finite

# What training keeps beside each codebook.
TRAINING_STATISTICS = ("inited", "cluster_size", "embed_avg")


@dataclass(frozen=True, slots=True)
class Storage:
    """One way to store a parameter: the tensors it takes, by key and shape, and how they make it."""

    shapes: Mapping[str, tuple[int, ...]]
    fold: Callable[..., Tensor]


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str, file_key: Callable[[str], str]) -> None:
    """Give a model built on the meta device its parameters, in float32, with weight and spectral norm folded.

    Args:
        model: holds parameters only under the names that `file_key` knows.
        state: the file's tensors, of any floating dtype.
        source: the file, for messages.
        file_key: from a parameter's name to its (folded) key in the file.

    Raises:
        CheckpointError: a key is missing, a tensor has another shape or a value that is not finite, or a key is left
            over.
    """
    missing: list[str] = []
    misshaped: list[str] = []
    used: set[str] = set()
    parameters: dict[str, Tensor] = {}
    for name, parameter in model.state_dict().items():
        storage = _storage(state, file_key(name), tuple(parameter.shape), transposed="convtr.convtr." in name)
        absent = [key for key in storage.shapes if key not in state]
        other = [
            f"{key!r} has shape {tuple(state[key].shape)}, expected {shape}"
            for key, shape in storage.shapes.items()
            if key in state and tuple(state[key].shape) != shape
        ]
        missing += absent
        misshaped += other
        used.update(storage.shapes)
        if not absent and not other:
            for key in storage.shapes:
                require_finite(state[key], key, source, torch.float32)
            parameters[name] = storage.fold(*(state[key].to(torch.float32) for key in storage.shapes))
            # A weight of zeros has no norm to be divided by.
            require_finite(parameters[name], file_key(name), source)
            stem, _, leaf = file_key(name).rpartition(".")
            if leaf == "embed":
                used.update(f"{stem}.{statistic}" for statistic in TRAINING_STATISTICS)

    if missing:
        raise CheckpointError(
            f"{source}: missing {_first(map(repr, missing))}; the file is incomplete or belongs to another "
            "configuration, so fetch or export it again"
        )
    if misshaped:
        raise CheckpointError(
            f"{source}: {_first(misshaped)}; weights and configuration belong to different models, so fetch "
            "or export both together"
        )
    if unexpected := sorted(set(state) - used):
        raise CheckpointError(
            f"{source}: unexpected {_first(map(repr, unexpected))}; the configuration names no such weights, "
            "so fetch or export both together"
        )
    model.load_state_dict(parameters, assign=True)


def _storage(state: Mapping[str, Tensor], key: str, shape: tuple[int, ...], *, transposed: bool) -> Storage:
    """The way in which `state` stores the parameter `key`, by the tensors that give it away."""
    stem, _, leaf = key.rpartition(".")
    parametrized = f"{stem}.parametrizations.{leaf}.original"
    if f"{key}_orig" in state:
        axis = 1 if transposed else 0
        vectors = {f"{key}_u": (shape[axis],), f"{key}_v": (shape[1 - axis] * shape[2],)}
        return Storage({f"{key}_orig": shape, **vectors}, _fold_transposed_spectral if axis else _fold_spectral)
    if f"{key}_v" in state:
        return Storage({f"{key}_g": (shape[0], 1, 1), f"{key}_v": shape}, _fold_weight_norm)
    if f"{parametrized}1" in state:
        return Storage({f"{parametrized}0": (shape[0], 1, 1), f"{parametrized}1": shape}, _fold_weight_norm)
    return Storage({key: shape}, lambda weight: weight)


def _fold_weight_norm(g: Tensor, v: Tensor) -> Tensor:
    """Weight norm (arXiv:1602.07868) of a weight `[d0, d1, k]`: one norm per entry of dimension 0.

    In a transposed convolution that is the input channel, as torch.nn.utils.weight_norm has it.
    """
    return v * (g / torch.linalg.vector_norm(v, dim=(1, 2), keepdim=True))


def _fold_spectral(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Spectral norm (arXiv:1802.05957): a weight `[d0, d1, k]` over its estimated largest singular value."""
    return weight / torch.dot(u, weight.flatten(1) @ v)


def _fold_transposed_spectral(weight: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """As `_fold_spectral`; torch takes the output channels, here dimension 1, as the rows."""
    return weight / torch.dot(u, weight.transpose(0, 1).flatten(1) @ v)


def _first(items: Iterable[str], limit: int = 3) -> str:
    items = list(items)
    rest = f" and {len(items) - limit} more" if len(items) > limit else ""
    return ", ".join(items[:limit]) + rest
