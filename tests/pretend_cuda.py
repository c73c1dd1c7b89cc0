"""A GPU that is not there: tensors lie in the host's memory, and torch refuses what it refuses on a real one.

For the lines that only run on CUDA. A tensor is "on the GPU" when its storage is marked so; it then has `cuda:0` for
its device. Refused, as a real GPU would: tensors of two devices in one operation, numpy arrays of a GPU's tensors,
kernels launched on the host's, and inside the capture of a graph every look at a value and every copy from the host.
A replayed graph does what was captured, at the addresses of then, and no Python. What no pretending shows: streams that
do not wait for each other, the numbers of real kernels, and time.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter

DEVICE = torch.device("cuda", 0)

_READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__int__,
    Tensor.__float__,
    Tensor.__index__,
    Tensor.nonzero,
    Tensor.masked_select,
    Tensor.is_nonzero,
    Tensor.equal,
    Tensor.allclose,
    torch.nonzero,
    torch.masked_select,
    torch.equal,
    torch.allclose,
}
"""What waits for the device and looks at a value."""

_METADATA = {
    Tensor.size,
    Tensor.stride,
    Tensor.dim,
    Tensor.numel,
    Tensor.data_ptr,
    Tensor.untyped_storage,
    Tensor.storage_offset,
    Tensor.is_contiguous,
    Tensor.element_size,
    Tensor.__len__,
    Tensor.__repr__,
    Tensor.__format__,
    Tensor.__hash__,
    torch._has_compatible_shallow_copy_type,
}

_SEES_TWO_DEVICES = {Tensor.copy_, Tensor.data.__set__}  # type: ignore[attr-defined]


@dataclass(slots=True)
class Call:
    """One captured call, and the tensors that it made."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    made: list[Tensor]

    def again(self) -> None:
        """Does it again, with the results where they were."""
        results = [x for x in tree_iter(self.function(*self.args, **self.kwargs)) if isinstance(x, Tensor)]
        for known, new in zip(self.made, results, strict=True):
            if new.data_ptr() != known.data_ptr():
                known.copy_(new)


@dataclass(slots=True)
class Graph:
    """`torch.cuda.CUDAGraph`."""

    calls: list[Call] = field(default_factory=list)

    def replay(self) -> None:
        """What was captured, once more."""
        with torch._C.DisableTorchFunction():
            for call in self.calls:
                call.again()


class Stream:
    """`torch.cuda.Stream`: everything is done at once."""

    def __init__(self, device: torch.device | None = None, priority: int = 0) -> None:
        assert device is None or device.type == "cuda"

    def wait_stream(self, stream: Stream) -> None: ...

    def synchronize(self) -> None: ...


class PretendCuda(TorchFunctionMode):
    """Torch with a GPU, in the threads where it is entered.

    Attributes:
        graphs: those captured so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self._marks: dict[int, StorageWeakRef] = {}  # held: so no address is used again
        self._local = threading.local()
        self.graphs: list[Graph] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func == Tensor.device.__get__:
            return DEVICE if self.holds(args[0]) else func(*args)
        if func == Tensor.is_cuda.__get__:  # type: ignore[attr-defined]
            return self.holds(args[0])
        if func in _METADATA:
            return func(*args, **kwargs)
        tensors = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor)]
        here = any(self.holds(x) for x in tensors)
        if func in (Tensor.numpy, Tensor.__array__):
            if here:
                raise TypeError("can't convert cuda:0 device type tensor to numpy")
            return func(*args, **kwargs)
        if func in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(func, args, kwargs)
        target = torch.device(kwargs["device"]) if kwargs.get("device") is not None else None
        if target is not None and target.type == "cuda":
            kwargs["device"] = "cpu"
            here = True
            if func is torch.tensor:
                self._refuse_in_capture("a copy from the host")
        elif target is not None:
            here = False
        elif here:
            self._check(func, args, tensors)
        if here and func in _READS:
            self._refuse_in_capture(f"{func.__name__} looks at a value")
        result = func(*args, **kwargs)
        if here:
            self._note(Call(func, args, kwargs, self._mark(result)))
        return result

    def holds(self, tensor: Tensor) -> bool:
        """Whether a tensor is on the GPU."""
        with torch._C.DisableTorchFunction():
            if tensor.device.type != "cpu" or tensor.is_mkldnn:  # packed weights have no storage to ask
                return False
            return tensor.untyped_storage()._cdata in self._marks

    def launch(self, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Runs a Triton kernel."""
        for x in (*args, *kwargs.values()):
            if isinstance(x, Tensor) and not self.holds(x):
                raise ValueError("Pointer argument cannot be accessed from Triton (cpu tensor?)")
        self._note(Call(run, args, kwargs, []))
        with torch._C.DisableTorchFunction():
            run(*args, **kwargs)

    @contextmanager
    def capture(self, graph: Graph, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        """`torch.cuda.graph`."""
        self._local.graph = graph
        try:
            yield
        finally:
            self._local.graph = None
        self.graphs.append(graph)

    def _moved(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tensor: Tensor = args[0]
        was_here = self.holds(tensor)
        rest, here = list(args[1:]), was_here
        if func != Tensor.to:
            here, rest, kwargs, func = func == Tensor.cuda, ["cpu"], {}, Tensor.to
        for i, value in enumerate(rest):
            if isinstance(value, Tensor):
                here = self.holds(value)
                rest[i : i + 1] = ["meta" if value.is_meta else "cpu", value.dtype]
                break
            if isinstance(value, str | torch.device):
                here, rest[i] = torch.device(value).type == "cuda", _on_the_host(value)
        if kwargs.get("device") is not None:
            here, kwargs["device"] = torch.device(kwargs["device"]).type == "cuda", _on_the_host(kwargs["device"])
        if here != was_here:
            self._refuse_in_capture("a copy between host and device")
            kwargs["copy"] = True
        result: Tensor = func(tensor, *rest, **kwargs)
        if here:
            self._note(Call(func, (tensor, *rest), kwargs, self._mark(result)))
        return result

    def _check(self, func: Callable[..., Any], args: tuple[Any, ...], tensors: list[Tensor]) -> None:
        """Whether the operation's tensors may meet: a number may come from the host, a tensor may not."""
        if func in _SEES_TWO_DEVICES:
            if not all(self.holds(x) for x in tensors):
                self._refuse_in_capture("a copy between host and device")
            return
        indexed = func in (Tensor.__getitem__, Tensor.__setitem__)
        if indexed:
            index = [x for x in tree_iter(args[1]) if isinstance(x, Tensor)]
            if any(x.dtype is torch.bool for x in index):
                self._refuse_in_capture("an index of truth values")
            if self.holds(args[0]) and not all(self.holds(x) for x in index):
                self._refuse_in_capture("an index from the host")
            # Without tensors in the index it is a copy, which may cross devices.
            tensors = [args[0], *index] if not index else [args[0], *(x for x in args[2:] if isinstance(x, Tensor))]
            if not self.holds(args[0]) and any(self.holds(x) for x in index):
                raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        strangers = [x for x in tensors if not self.holds(x) and (x.dim() > 0 or x.is_meta)]
        if strangers:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {getattr(func, '__name__', func)} got one of "
                f"{list(strangers[0].shape)} on {strangers[0].device} beside those on {DEVICE}"
            )

    def _mark(self, result: Any) -> list[Tensor]:
        tensors = [x for x in tree_iter(result) if isinstance(x, Tensor)]
        for x in tensors:
            if x.device.type == "cpu":
                storage = x.untyped_storage()
                if storage._cdata not in self._marks:
                    self._marks[storage._cdata] = StorageWeakRef(storage)
        return tensors

    def _note(self, call: Call) -> None:
        graph = getattr(self._local, "graph", None)
        if graph is not None:
            graph.calls.append(call)

    def _refuse_in_capture(self, what: str) -> None:
        if getattr(self._local, "graph", None) is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")


def _on_the_host(device: str | torch.device) -> str:
    return "meta" if torch.device(device).type == "meta" else "cpu"


@dataclass(frozen=True, slots=True)
class _Properties:
    name: str = "pretended"
    total_memory: int = 2**32
    multi_processor_count: int = 4


@contextmanager
def pretend_cuda() -> Iterator[PretendCuda]:
    """A GPU in this thread and in those that start meanwhile."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        mode = PretendCuda()
        _patch(monkeypatch, mode)
        with mode:
            yield mode


def _patch(monkeypatch: pytest.MonkeyPatch, mode: PretendCuda) -> None:
    stream = Stream()
    stands_in = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": lambda _: None,
        "device": lambda _: nullcontext(),
        "synchronize": lambda *_: None,
        "Stream": Stream,
        "stream": lambda _: nullcontext(),
        "set_stream": lambda _: None,
        "current_stream": lambda *_: stream,
        "mem_get_info": lambda *_: (2**31, 2**32),
        "get_device_properties": lambda _: _Properties(),
        "CUDAGraph": Graph,
        "graph_pool_handle": object,
        "graph": mode.capture,
    }
    for name, value in stands_in.items():
        monkeypatch.setattr(torch.cuda, name, value)
    parse_to = torch._C._nn._parse_to

    def parse_to_like(*args: Any, **kwargs: Any) -> Any:
        """Of `Module.to`, which takes another tensor's device where that is given."""
        device, *rest = parse_to(*args, **kwargs)
        return (DEVICE if args and isinstance(args[0], Tensor) and mode.holds(args[0]) else device, *rest)

    monkeypatch.setattr(torch._C._nn, "_parse_to", parse_to_like)
    run = threading.Thread.run

    def run_with_it(thread: threading.Thread) -> None:
        with mode:
            run(thread)

    monkeypatch.setattr(threading.Thread, "run", run_with_it)
    try:
        from triton.runtime.interpreter import GridExecutor
    except ImportError:
        pass  # the plain kernels, then
    else:
        execute = GridExecutor.__call__
        monkeypatch.setattr(
            GridExecutor,
            "__call__",
            lambda self, *args, **kwargs: mode.launch(lambda *a, **k: execute(self, *a, **k), args, kwargs),
        )
