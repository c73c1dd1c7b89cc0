"""Functions over tensors that never move, captured once as CUDA graphs and replayed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Run = Callable[[], None]


class CudaCapture:
    """Captures functions as CUDA graphs that share their scratch memory, as no two of them run at once."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # A replay keeps this priority: its many short kernels go before those of stems and audio on other streams.
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Run) -> Run:
        """A replay of what `run` does; runs it for real first, for what happens only once (loading kernels)."""
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            for _ in range(2):
                run()
        current.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile (they encode conditions), and must not spoil this capture.
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"):
            run()
        return _Replay(graph, run)


@dataclass(frozen=True, slots=True)
class _Replay:
    """A graph, and what was captured in it: that owns tensors which the graph reads and does not hold."""

    graph: torch.cuda.CUDAGraph
    captured: Run

    def __call__(self) -> None:
        self.graph.replay()


class Addresses:
    """Where tensors stood when they were captured; a replay reads and writes there, whatever the names mean since.

    Args:
        tensors: what is written between replays, by name.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = dict(tensors)  # held, so that nothing else is ever put where they are

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Raises `RuntimeError` if a tensor is no longer the one captured; says which, and what to do."""
        for name, captured in self._tensors.items():
            tensor = tensors[name]
            if (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) != (
                captured.data_ptr(),
                captured.shape,
                captured.stride(),
                captured.dtype,
            ):
                raise RuntimeError(
                    f"`{name}` is {tensor.dtype} {list(tensor.shape)} at another address than the {captured.dtype} "
                    f"{list(captured.shape)} captured in the CUDA graph, which would go on reading the old one. Write "
                    "into the tensor (`copy_`, or by index) instead of replacing it, or set `cuda_graphs: false`."
                )
