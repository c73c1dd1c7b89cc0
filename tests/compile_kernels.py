"""`python -m tests.compile_kernels CAPABILITY`: builds every Triton kernel for a GPU that need not be there.

Prints each kernel's name, dtype and shared memory in bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from handler.lm import triton_attention, triton_linear, triton_tokens

DTYPES = ("fp16", "bf16", "fp32")
NUMBERS = dict.fromkeys(
    ("count", "steps", "places_stride", "q_stride", "k_stride", "v_stride", "row_stride", "head_stride", "past"), "i32"
)
PLACES = dict.fromkeys(
    (
        "rows_ptr",
        "lengths_ptr",
        "sequences_ptr",
        "request_of_ptr",
        "requests_ptr",
        "places_ptr",
        "step_ptr",
        "last_step_ptr",
        "offsets_ptr",
        "positions_ptr",
        "top_k_ptr",
    ),
    "*i64",
)
COUNTERS = {"counter_ptr": "*i32", "arrived_ptr": "*i32", "diverged_ptr": "*i32", "greedy_ptr": "*i1"}
FLOATS = dict.fromkeys(
    ("partial_ptr", "logits_ptr", "draws_ptr", "coef_ptr", "beta_ptr", "temperature_ptr", "top_p_ptr"), "*fp32"
)
TYPES = {**NUMBERS, **PLACES, **COUNTERS, **FLOATS, "scale": "fp32"}
"""What the launches of `handler/lm` give; all other pointers are of the model's dtype."""

LINEAR: dict[str, Any] = {"inputs": 1024, "outputs": 4096, "biased": False, "block_rows": 16, "block_in": 256}
ATTEND: dict[str, Any] = {"repeat": 1, "head_dim": 64, "padded_dim": 64, "block": triton_attention.BLOCK}
CASES: list[tuple[Any, dict[str, Any], dict[str, int]]] = [
    (triton_linear._linear, {**LINEAR, **case}, {"num_warps": 4})
    for case in (
        {"norms": True, "adds": False, "activation": "", "block_out": 16},
        {"norms": True, "adds": False, "activation": "gelu", "block_out": 16},
        {"norms": False, "adds": True, "activation": "", "block_out": 8},
    )
]
CASES += [
    (triton_attention._attend, {**ATTEND, "splits": splits, "writes": writes}, {"num_warps": 4})
    for splits in (1, 8)
    for writes in (True, False)
]
CASES += [
    (
        triton_tokens._embed,
        {"codebooks": 4, "tokens": 2049, "dim": 1024, "adds": adds, "block": 256},
        {"num_warps": 4},
    )
    for adds in (False, True)
]
CASES.append(
    (triton_tokens._sample, {"codebooks": 4, "card": 2048, "unknown": -1, "block": 2048}, {"num_warps": 8}),
)


def build(kernel: Any, constants: Mapping[str, Any], options: Mapping[str, int], dtype: str, capability: int) -> Any:
    """The kernel as the GPU would run it."""
    names = [parameter.name for parameter in kernel.params]
    signature = {name: "constexpr" if name in constants else TYPES.get(name, f"*{dtype}") for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    # Torch's memory is aligned, which lets loads be of 16 bytes, and be pipelined through shared memory.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=values, attrs=aligned)
    if kernel is triton_linear._linear:
        options = {**options, "num_stages": triton_linear.num_stages(4 if dtype == "fp32" else 2)}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=dict(options))


def main(capability: int) -> None:
    for kernel, constants, options in CASES:
        for dtype in DTYPES:
            built = build(kernel, constants, options, dtype, capability)
            assert built.asm["cubin"]
            print(kernel.fn.__name__, dtype, built.metadata.shared)


if __name__ == "__main__":
    main(int(sys.argv[1]))
