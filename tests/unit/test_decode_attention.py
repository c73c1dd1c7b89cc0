"""Attention of single queries at fixed addresses: each row sees its own past and condition, by either way."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from handler.lm.decode_attention import AttentionKernel, MaskedAttention, check_kernel

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def kernels() -> dict[str, AttentionKernel]:
    """The plain way, and Triton's where it is installed (it comes with torch for GPUs), interpreted on a CPU."""
    found: dict[str, AttentionKernel] = {"masked": MaskedAttention()}
    if importlib.util.find_spec("triton") is not None:
        from handler.lm.triton_attention import TritonAttention

        found |= {f"triton_{n}_programs": TritonAttention(DEVICE, programs=n) for n in (1, 60)}
    return found


KERNELS = kernels()


@pytest.fixture(autouse=True)
def _device() -> Iterator[None]:
    with DEVICE:
        yield


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator(DEVICE).manual_seed(seed)).to(dtype)


def expected_for(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """q `[H, head_dim]` over keys and values `[H_kv, L, head_dim]`."""
    repeat = len(q) // len(keys)
    keys, values = keys.repeat_interleave(repeat, 0).double(), values.repeat_interleave(repeat, 0).double()
    scores = (keys @ q.double()[:, :, None])[:, :, 0] / q.shape[1] ** 0.5  # [H, L]
    return (scores.softmax(-1)[:, None] @ values)[:, 0]


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "past"), [(4, 4, 64, 1000), (4, 2, 16, 1000), (2, 2, 24, 70), (2, 2, 8, 0)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_row_sees_its_own_past(
    kernel: AttentionKernel, heads: int, kv_heads: int, head_dim: int, past: int, dtype: torch.dtype
) -> None:
    positions = torch.tensor([0, 1, 63, 64, 150, 199])
    rows = torch.tensor([6, 0, 3, 2, 5, 1])
    keys, values = random(2, 7, kv_heads, 200, head_dim, dtype=dtype)
    for row, position in zip(rows, positions, strict=True):
        keys[row, :, position:] = values[row, :, position:] = float("nan")  # left by others, or nobody
    qkv = random(6, (heads + 2 * kv_heads) * head_dim, dtype=dtype, seed=1)
    kv_dim = kv_heads * head_dim
    q, k, v = (x.unflatten(-1, (-1, head_dim)) for x in qkv.split([heads * head_dim, kv_dim, kv_dim], -1))
    for _ in range(2):
        out = kernel.over_past(q, k, v, keys, values, rows, positions, past)
        assert out.dtype == dtype
        for n, (row, position) in enumerate(zip(rows.tolist(), positions.tolist(), strict=True)):
            assert torch.equal(keys[row, :, position], k[n])
            assert torch.equal(values[row, :, position], v[n])
            seen = slice(max(0, position - past), position + 1)
            wanted = expected_for(q[n], keys[row, :, seen], values[row, :, seen])
            tolerance = 1e-5 if dtype == torch.float32 else 4e-3
            torch.testing.assert_close(out[n].double(), wanted, atol=tolerance, rtol=tolerance)
    assert keys[4].isfinite().all()  # the row of nobody here


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_each_row_sees_its_own_condition_and_a_null_one_gives_its_value(
    kernel: AttentionKernel, dtype: torch.dtype
) -> None:
    heads, head_dim = 3, 16
    lengths = torch.tensor([130, 0, 1, 64, 7])
    rows = torch.tensor([3, 1, 0, 4])
    keys, values = random(2, 5, heads, 130, head_dim, dtype=dtype)
    for row, length in enumerate(lengths):
        keys[row, :, length:] = values[row, :, length:] = float("nan")
    q, null_value = random(4, heads, head_dim, dtype=dtype, seed=1), random(heads, head_dim, dtype=dtype, seed=2)
    out = kernel.over_condition(q, keys, values, rows, lengths, null_value)
    for n, row in enumerate(rows.tolist()):
        length = int(lengths[row])
        if length == 0:
            assert torch.equal(out[n], null_value)
            continue
        wanted = expected_for(q[n], keys[row, :, :length], values[row, :, :length])
        tolerance = 1e-5 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(out[n].double(), wanted, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_rows_bits_do_not_depend_on_the_rows_beside_it(kernel: AttentionKernel) -> None:
    keys, values = random(2, 4, 2, 300, 16)
    q, k, v = random(3, 4, 2, 16, seed=1)
    rows = torch.arange(4)

    def run(positions: list[int], order: list[int]) -> Tensor:
        at = torch.tensor(positions)
        return kernel.over_past(q[order], k[order], v[order], keys.clone(), values.clone(), rows[order], at, 300)

    one = run([250, 10, 20, 30], [0, 1, 2, 3])
    other = run([299, 3, 250, 0], [3, 1, 0, 2])
    assert torch.equal(one[0], other[2])


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_a_kernel_is_tried_before_it_is_trusted(kernel: AttentionKernel) -> None:
    check_kernel(kernel, DEVICE, torch.float16)


def test_a_kernel_that_is_wrong_is_found_out() -> None:
    class Forgetful(MaskedAttention):
        def over_past(
            self,
            q: Tensor,
            k: Tensor,
            v: Tensor,
            keys: Tensor,
            values: Tensor,
            rows: Tensor,
            positions: Tensor,
            past: int,
        ) -> Tensor:
            return super().over_past(q, k, v, keys, values, rows, positions, past=10)

    with pytest.raises(ArithmeticError, match="differs by"):
        check_kernel(Forgetful(), DEVICE, torch.float16)
