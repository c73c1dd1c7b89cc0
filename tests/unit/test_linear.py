"""Every fast product gives what the plain one gives, and a row the same bits whatever rows stand beside it.

What this CPU cannot compute takes a slower path or is refused, and these tests hold for that path. The lowered run of
`make test` repeats them as on a CPU with AVX2 alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import handler.half
import handler.linear
import handler.musicgen
from handler.errors import RequestError
from handler.half import HalfLinear, can_halve, fits_half
from handler.linear import Linear, can_prepack, keeps_rows, kept_in
from handler.lm.transformer import bytes_of_value, lay_out
from handler.musicgen import serving_dtype
from handler.quantized import can_quantize

CPU = torch.device("cpu")
SIZES = [(48, 32), (512, 256), (1024, 4096), (3072, 1024)]
Kind = tuple[torch.dtype, torch.dtype]
"""What the checkpoint holds, and what is served."""
FLOAT32, HALF = (torch.float32, torch.float32), (torch.float16, torch.float32)
BFLOAT16, INT8 = (torch.float32, torch.bfloat16), (torch.float32, torch.int8)
ERRORS = {FLOAT32: 2e-6, HALF: 2e-6, BFLOAT16: 1e-2} | ({INT8: 2e-2} if can_quantize() else {})
"""Of products with a standard deviation of 1, in the root mean square; of each kind that this CPU serves."""
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"  # of this run, which may be a lowered one


@pytest.fixture(params=[1, 2], autouse=True)
def _threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def made(sizes: tuple[int, int], kind: Kind, bias: bool = False) -> tuple[Linear, Tensor, Tensor | None]:
    """A product, its weight and its bias."""
    stored, dtype = kind
    generator = torch.Generator().manual_seed(sum(sizes))
    weight = (torch.randn(sizes, generator=generator) * sizes[1] ** -0.5).to(stored)
    shift = torch.randn(sizes[0], generator=generator) if bias else None
    return lay_out(weight, shift, CPU, dtype), weight.float(), shift


def inputs(rows: int, linear: Linear, kind: Kind) -> tuple[Tensor, Tensor]:
    """Inputs and a residual, in what a model of this dtype computes in."""
    _, dtype = kind
    generator = torch.Generator().manual_seed(rows)
    wide = (
        torch.randn(rows, linear.in_features, generator=generator),
        torch.randn(rows, linear.out_features, generator=generator),
    )
    x, residual = (t.to(torch.float32 if dtype is torch.int8 else dtype) for t in wide)
    return x, residual


def error(result: Tensor, expected: Tensor) -> float:
    return float((result.double() - expected).pow(2).mean().sqrt())


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("sizes", SIZES)
def test_a_product_is_that_of_the_plain_linear(sizes: tuple[int, int], bias: bool, kind: Kind) -> None:
    linear, weight, shift = made(sizes, kind, bias)
    for rows in (1, 2, 4, 7, 33):
        x, residual = inputs(rows, linear, kind)
        plain = F.linear(x.double(), weight.double(), None if shift is None else shift.double())
        before = residual.clone()
        bound = ERRORS[kind] * (1 if shift is None else 1.5)
        assert error(linear(x), plain) < bound
        assert error(linear(x, "relu"), F.relu(plain)) < bound
        assert error(linear(x, "gelu"), F.gelu(plain)) < bound
        assert error(linear.add_to(residual, x), residual + plain) < 1.5 * bound
        assert torch.equal(residual, before)


@pytest.mark.parametrize("kind", [FLOAT32, HALF])
def test_a_float32_product_has_the_precision_of_float32(kind: Kind) -> None:
    linear, weight, _ = made((3072, 1024), kind)
    x, _ = inputs(4, linear, kind)
    exact = F.linear(x.double(), weight.double())
    assert error(linear(x), exact) < 1e-6  # half of what rounding each of 1,024 sums to float32 adds up to
    plain = linear(x)
    assert torch.equal(linear(x, "gelu"), F.gelu(plain))


@pytest.mark.parametrize("kind", ERRORS)
@pytest.mark.parametrize("sizes", SIZES)
def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(sizes: tuple[int, int], kind: Kind) -> None:
    linear, _, _ = made(sizes, kind)
    x, residual = inputs(100, linear, kind)
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


@pytest.mark.skipif(not can_halve(), reason="this CPU's products with float16 weights depend on the number of rows")
def test_float32_of_weights_that_float16_holds_keeps_them_in_float16() -> None:
    for kind, halved in ((HALF, True), (FLOAT32, False), (BFLOAT16, False)):
        linear, weight, _ = made((512, 256), kind)
        assert isinstance(linear, HalfLinear) == halved
        assert halved == (kind[1] is torch.float32 and bytes_of_value(weight, CPU, kind[1]) == 2)
    weight = torch.tensor([[0.5, -3.0]])
    assert fits_half(weight)
    assert fits_half(weight.bfloat16())
    for loses in (0.1, 1e5, 1e-9, float("nan")):
        assert not fits_half(torch.cat([weight, torch.full((1, 2), loses)]))


def test_weights_stay_in_float32_where_products_with_float16_depend_on_the_number_of_rows(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(handler.half, "can_halve", lambda: False)
    linear, weight, _ = made((512, 256), HALF)
    assert not isinstance(linear, HalfLinear)
    assert bytes_of_value(weight, CPU, torch.float32) == 4


def test_bfloat16_is_computed_in_float32_where_the_cpu_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.linear, "can_prepack", lambda dtype: dtype is torch.float32 and can_prepack(dtype))
    linear, weight, shift = made((512, 256), BFLOAT16, bias=True)
    x, residual = inputs(5, linear, BFLOAT16)
    assert shift is not None
    exact = F.linear(x.float(), weight.bfloat16().float(), shift.bfloat16().float())
    torch.testing.assert_close(linear(x), exact.bfloat16(), rtol=0.008, atol=1e-6)  # the last bit of bfloat16
    assert linear.add_to(residual, x).dtype is torch.bfloat16
    assert keeps_rows(linear, inputs(40, linear, BFLOAT16)[0])
    assert (kept_in(torch.bfloat16, CPU), bytes_of_value(weight, CPU, torch.bfloat16)) == (torch.float32, 4)


@pytest.mark.parametrize("kind", [FLOAT32, HALF, BFLOAT16])
def test_without_prepacked_products_the_plain_ones_serve(kind: Kind, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.linear, "can_prepack", lambda dtype: False)
    monkeypatch.setattr(handler.half, "can_halve", lambda: False)
    linear, weight, _ = made((512, 256), kind)
    x, residual = inputs(5, linear, kind)
    plain = F.linear(x.double(), weight.double())
    assert error(linear(x, "gelu"), F.gelu(plain)) < ERRORS[kind]
    assert error(linear.add_to(residual, x), residual + plain) < 1.5 * ERRORS[kind]
    assert keeps_rows(linear, inputs(40, linear, kind)[0])


def test_products_whose_bits_depend_on_the_number_of_rows_are_found_out() -> None:
    weight, x = torch.randn(48, 64), torch.randn(40, 64)

    def fickle(rows: Tensor) -> Tensor:
        return rows @ weight.T + (1e-7 if len(rows) == 7 else 0.0)

    assert keeps_rows(lambda rows: torch.stack([weight @ row for row in rows]), x)
    assert not keeps_rows(fickle, x)


def test_this_torch_has_the_fast_products() -> None:
    # They are private: with a torch that has them no more, everything goes on, but at a third of the speed.
    assert can_prepack(torch.float32)
    if HAS_AVX512:
        assert can_halve()
        assert can_prepack(torch.bfloat16)
        assert can_quantize() or not torch.cpu._is_vnni_supported()


@pytest.mark.parametrize(("bfloat16", "advice"), [(True, "bfloat16 or float32"), (False, "float32")])
def test_int8_where_it_cannot_be_says_what_to_set(bfloat16: bool, advice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handler.musicgen, "can_quantize", lambda: False)
    monkeypatch.setattr(handler.musicgen, "can_prepack", lambda dtype: bfloat16)
    with pytest.raises(RequestError, match=f"set dtype to {advice}$"):
        serving_dtype("int8", CPU)


def test_rows_of_zeros_give_the_bias() -> None:
    for kind in ERRORS:
        linear, _, shift = made((48, 32), kind, bias=True)
        x, _ = inputs(3, linear, kind)
        assert shift is not None
        assert torch.equal(linear(x * 0), shift.to(x.dtype).expand(3, -1))
