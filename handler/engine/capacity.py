"""How many requests an engine can hold, given its memory."""

from __future__ import annotations

from pathlib import Path

import torch

from handler.cgroup import available_memory
from handler.checkpoint import LM_FILE, Pointer, read_checkpoint
from handler.engine.scheduler import Capacity
from handler.engine.spec import ModelSpec
from handler.errors import CheckpointError
from handler.lm.attention import KVCache
from handler.lm.block_attention import whole_blocks
from handler.lm.transformer import bytes_of_value
from handler.musicgen import MusicGen, serving_device, serving_dtype

_ROWS_OF_A_REQUEST = 2  # with guidance, as nearly every request has it
_MOST_ROWS = 3  # with double guidance: a request that any server must be able to hold
_SHARE_OF_FREE_MEMORY = {"cpu": 0.5, "cuda": 0.85}
_BESIDE_MELODIES = 3 * 2**30
"""Of a GPU's memory, kept for the stems of as many melodies as are separated at once."""
_WEIGHT_FILES = (".bin", ".safetensors")


def require_room(spec: ModelSpec) -> None:
    """Checks, before anything is loaded, that the model fits.

    Raises:
        CheckpointError: if its weights alone take more than the budget, or than is free.
    """
    device = serving_device(spec.device)
    needed = model_bytes(spec)
    room = _free_memory(device)
    what = f"free on {device}" if device.type == "cuda" else "free on this machine or within its container's limit"
    if spec.memory_budget is not None and spec.memory_budget < room:
        room, what = spec.memory_budget, "the `memory_budget` of the handler block in model-config.yaml"
    if needed > room:
        raise CheckpointError(
            f"the model's weights take {_mib(needed)}, and {_mib(room)} is {what}. Serve a smaller variant or dtype, "
            "or make room."
        )


def model_bytes(spec: ModelSpec) -> int:
    """The bytes of all weights as they are served: the language model's as laid out, the others' as on the disk."""
    device = serving_device(spec.device)
    dtype = serving_dtype(spec.dtype, device)
    checkpoint = read_checkpoint(spec.checkpoint / LM_FILE)
    tensors = [] if isinstance(checkpoint, Pointer) else list(checkpoint.state.values())
    model = sum(tensor.numel() * bytes_of_value(tensor, device, dtype) for tensor in tensors)
    files = [path for folder in (spec.checkpoint, spec.hub_dir) for path in _weight_files(folder)]
    beside = sum(path.stat().st_size for path in set(files) if path != spec.checkpoint / LM_FILE)
    return model + beside


def capacity_for(model: MusicGen, spec: ModelSpec) -> Capacity:
    """The rows that fit the budget beside the model, for at most `max_concurrency` requests.

    Raises:
        CheckpointError: if the budget cannot hold one request; says how much one takes.
    """
    steps = model.lm.pattern_provider.get(int(model.max_duration * model.frame_rate)).num_steps
    positions = steps + model.longest_prefix(spec.max_prompt_tokens)
    held = [positions, model.longest_condition(spec.max_prompt_tokens)]  # of the past, and of cross-attention
    if model.device.type == "cpu":
        held = [whole_blocks(length) for length in held]
    row_bytes = KVCache.row_bytes(model.lm.config, sum(held), model.device, model.lm.dtype)
    free = _free_memory(model.device)
    budget = int(free * _SHARE_OF_FREE_MEMORY[model.device.type])
    if model.device.type == "cuda" and model.melody is not None:
        budget = min(budget, free - _BESIDE_MELODIES)
    if spec.memory_budget is not None:
        budget = spec.memory_budget - model_bytes(spec)
    rows = min(max(_ROWS_OF_A_REQUEST * spec.max_concurrency, _MOST_ROWS), budget // row_bytes)
    if rows < _MOST_ROWS:
        raise CheckpointError(
            f"the keys and values of one request take {_mib(_MOST_ROWS * row_bytes)}, and beside the model there is "
            f"room for {_mib(budget)}. Raise `memory_budget` in the handler block of model-config.yaml, make room, or "
            "serve a smaller variant."
        )
    return Capacity(min(spec.max_concurrency, rows), rows, positions, steps)


def _weight_files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.suffix in _WEIGHT_FILES]


def _mib(size: int) -> str:
    return f"{max(0, size) / 2**20:.0f} MiB"


def _free_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return available_memory()
