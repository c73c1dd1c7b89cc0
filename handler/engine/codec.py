"""Where the engine decodes audio: on a GPU beside the decode steps, on a CPU between them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


def codec_executor(device: torch.device) -> Executor:
    """Runs what it is given in order.

    On a GPU in one thread with a stream of its own, for which the decode steps do not wait. On a CPU at once: the codec
    and the decode step both use all cores, and side by side take longer than one after the other.
    """
    if device.type != "cuda":
        return AtOnce()
    return ThreadPoolExecutor(1, "codec", _take_a_stream, (device,))


class AtOnce(Executor):
    """Runs what it is given when it is given it."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """A future that is done."""
        future: Future[T] = Future()
        try:
            future.set_result(fn(*args, **kwargs))
        except Exception as error:
            future.set_exception(error)
        return future


def _take_a_stream(device: torch.device) -> None:
    torch.cuda.set_device(device)
    torch.cuda.synchronize(device)  # the weights are there
    torch.cuda.set_stream(torch.cuda.Stream(device))
