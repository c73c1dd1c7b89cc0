"""Every fast product gives what the plain one gives, and a row the same bits whatever rows stand beside it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import handler.linear
import handler.quantized
from handler.linear import Linear
from handler.lm.transformer import lay_out

CPU = torch.device("cpu")
SIZES = [(48, 32), (512, 256), (1024, 4096), (3072, 1024)]
ERRORS = {torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.int8: 2e-2}
"""Of products with a standard deviation of 1, in the root mean square."""


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def made(sizes: tuple[int, int], dtype: torch.dtype, bias: bool = False) -> tuple[Linear, Tensor, Tensor | None]:
    """A product, its weight and its bias."""
    generator = torch.Generator().manual_seed(sum(sizes))
    weight = torch.randn(sizes, generator=generator) * sizes[1] ** -0.5
    shift = torch.randn(sizes[0], generator=generator) if bias else None
    return lay_out(weight, shift, CPU, dtype), weight, shift


def inputs(rows: int, linear: Linear, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Inputs and a residual, in what a model of this dtype computes in."""
    generator = torch.Generator().manual_seed(rows)
    wide = (
        torch.randn(rows, linear.in_features, generator=generator),
        torch.randn(rows, linear.out_features, generator=generator),
    )
    x, residual = (t.to(torch.float32 if dtype is torch.int8 else dtype) for t in wide)
    return x, residual


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).pow(2).mean().sqrt())


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_product_is_that_of_the_plain_linear(sizes: tuple[int, int], bias: bool, dtype: torch.dtype) -> None:
    linear, weight, shift = made(sizes, dtype, bias)
    for rows in (1, 2, 4, 7, 33):
        x, residual = inputs(rows, linear, dtype)
        plain = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
        before = residual.clone()
        bound = ERRORS[dtype] * (1 if shift is None else 1.5)
        assert error(linear(x), plain) < bound
        assert error(linear(x, "relu"), F.relu(plain)) < bound
        assert error(linear(x, "gelu"), F.gelu(plain)) < bound
        assert error(linear.add_to(residual, x), residual + plain) < 1.5 * bound
        assert torch.equal(residual, before)


def test_a_float32_product_has_the_precision_of_float32() -> None:
    linear, weight, _ = made((3072, 1024), torch.float32)
    x, _ = inputs(4, linear, torch.float32)
    exact = F.linear(x.double(), weight.double())
    assert error(linear(x), exact) <= 2 * error(F.linear(x, weight), exact)  # another order of sums
    plain = linear(x)
    assert torch.equal(linear(x, "gelu"), F.gelu(plain))


@pytest.mark.parametrize("dtype", ERRORS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(sizes: tuple[int, int], dtype: torch.dtype) -> None:
    linear, _, _ = made(sizes, dtype)
    x, residual = inputs(100, linear, dtype)
    products, activations, sums = linear(x[:16]), linear(x[:16], "gelu"), linear.add_to(residual[:16], x[:16])
    shuffle = torch.Generator().manual_seed(0)
    for rows in [*range(1, 41), 64, 100]:
        order = torch.randperm(100, generator=shuffle)
        order = torch.cat([order[:1] % 16, order[1:rows]])  # one of the 16 at least
        known = order < 16
        for together, alone in (
            (linear(x[order]), products),
            (linear(x[order], "gelu"), activations),
            (linear.add_to(residual[order], x[order]), sums),
        ):
            assert torch.equal(together[known], alone[order[known]])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_prepacked_products_the_plain_ones_serve(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.linear, "_CAN_PREPACK", False)
    linear, weight, _ = made((512, 256), dtype)
    x, residual = inputs(5, linear, dtype)
    plain = F.linear(x.double(), weight.double())
    assert error(linear(x, "gelu"), F.gelu(plain)) < ERRORS[dtype]
    assert error(linear.add_to(residual, x), residual + plain) < 1.5 * ERRORS[dtype]


def test_this_torch_has_the_fast_products() -> None:
    # They are private: with a torch that has them no more, everything goes on, but at a third of the speed.
    assert handler.linear.can_prepack()
    assert handler.quantized.can_quantize()


def test_int8_where_it_cannot_be_says_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.quantized, "_CAN_QUANTIZE", False)
    with pytest.raises(RuntimeError, match="set dtype to bfloat16"):
        made((48, 32), torch.int8)


def test_rows_of_zeros_give_the_bias() -> None:
    for dtype in ERRORS:
        linear, _, shift = made((48, 32), dtype, bias=True)
        x, _ = inputs(3, linear, dtype)
        assert shift is not None
        assert torch.equal(linear(x * 0), shift.to(x.dtype).expand(3, -1))
