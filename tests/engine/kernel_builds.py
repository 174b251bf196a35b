"""A program that compiles every kernel to machine code for an H200. This needs no GPU.

The types and constants are those of the released models. For each kernel it prints one line, as
`kernel_checks.py` does.
"""

import json
import traceback
from typing import Any

import torch

from musicgen_svc.engine import kernels, sampling_kernels

SHARED_MEMORY = 48 * 1024  # bytes that every kernel may use
TYPES = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.long: "*i64",
    torch.int8: "*i8",
    int: "i32",
    float: "fp32",
}
HALF, SINGLE, LONG = torch.float16, torch.float32, torch.long

ATTEND: dict[str, Any] = {
    **dict.fromkeys(("query", "new_keys", "new_values", "keys", "values", "out"), HALF),
    **dict.fromkeys(("row_stride", "head_stride", "cache_stride", "cache_head_stride"), int),
    "lengths": LONG, "parts": SINGLE, "sums": SINGLE, "scale": float, "HEAD": 64, "WIDTH": 64, "BLOCK": 128,
}  # fmt: skip
SAMPLED: dict[str, Any] = {"temperature": SINGLE, "tokens": LONG, "GREEDY_BELOW": 0.01, "CARD": 2048}
BUILDS: dict[str, tuple[Any, dict[str, Any], int]] = {
    "_attend, split": (
        kernels._attend, ATTEND | {"SHARING": 1, "SPLIT": 256, "STORE": True, "WHOLE": False}, 4
    ),
    "_attend, text": (
        kernels._attend,
        ATTEND | {"parts": HALF, "sums": HALF, "SHARING": 2, "SPLIT": 512, "STORE": False, "WHOLE": True}, 4,
    ),
    "_combine": (
        kernels._combine,
        {"parts": SINGLE, "sums": SINGLE, "out": HALF, "HEAD": 64, "WIDTH": 64, "SPLITS": 16}, 4,
    ),
    "_add_norm": (
        kernels._add_norm,
        {
            **dict.fromkeys(("x", "weight", "bias", "total"), SINGLE), "delta": HALF, "normed": HALF,
            "x_stride": int, "delta_stride": int, "eps": float, "DIM": 1536, "BLOCK": 2048, "ADD": True,
        }, 8,
    ),
    "_guided_softmax": (
        sampling_kernels._guided_softmax,
        SAMPLED | {"logits": HALF, "guidance": SINGLE, "probabilities": SINGLE, "ROW": 2048}, 8,
    ),
    "_race": (
        sampling_kernels._race,
        {
            **dict.fromkeys(("probabilities", "top_p", "races"), SINGLE),
            **dict.fromkeys(("top_k", "seed", "step"), LONG), "CARD": 2048, "TOKENS": 64, "OTHERS": 128,
        }, 4,
    ),
    "_choose": (sampling_kernels._choose, SAMPLED | {"races": SINGLE, "ROW": 2048}, 8),
    **{
        f"_int8_linear, {rows} rows, {block} outputs": (
            kernels._int8_linear,
            {
                "x": HALF, "weight": torch.int8, "scales": SINGLE, "out": HALF,
                **dict.fromkeys(("rows", "outputs", "row_stride"), int),
                "INPUTS": 1536, "ROWS": rows, "BLOCK_OUT": block, "BLOCK_IN": 256,
            }, 4,
        )
        for rows, block in ((16, 16), (32, 32))
    },
}  # fmt: skip


def build(kernel: Any, arguments: dict[str, Any], warps: int) -> None:
    """Compiles a kernel.

    Args:
        kernel: the Triton function.
        arguments: by name, the dtype or type of each argument, or the value of each constant.
        warps: how many warps a program has.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    assert arguments.keys() == set(kernel.arg_names)
    kinds = {name: arguments[name] for name in kernel.arg_names}
    signature = {
        name: TYPES[kind] if isinstance(kind, (torch.dtype, type)) else "constexpr"
        for name, kind in kinds.items()
    }
    constants = {
        (at,): kinds[name] for at, name in enumerate(kernel.arg_names) if signature[name] == "constexpr"
    }
    aligned = {
        (at,): [["tt.divisibility", 16]] for at, kind in enumerate(signature.values()) if kind[0] in "*i"
    }
    source = ASTSource(kernel, signature, constants, aligned)
    built = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    assert built.asm["cubin"] and built.metadata.shared <= SHARED_MEMORY, built.metadata


def main() -> None:
    """Compiles all of them, and prints the name and the failure, or null, of each as JSON."""
    for name, what in BUILDS.items():
        try:
            build(*what)
            failure = None
        except Exception:
            failure = traceback.format_exc()
        print(json.dumps([name, failure]), flush=True)


if __name__ == "__main__":
    main()
