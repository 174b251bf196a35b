"""Compiles the kernels that a step launches to machine code, for GPUs that need not be there.

The launches are recorded from a step on PyTorch's meta device, so they are those of the product: the types,
the constants and the number of warps are not written down again here.
"""

import re
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from benchmarks.random_models import language_model
from musicgen_svc.engine.chain import launches
from musicgen_svc.engine.chain.chain import Chain
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.state import Capacity, DeviceState

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.long: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    int: "i32",
    float: "fp32",
}
INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of a kernel: all that decides its machine code."""

    kernel: Any
    types: tuple[tuple[str, str], ...]  # of the parameters that are no constants
    constants: tuple[tuple[str, Any], ...]
    warps: int

    @property
    def name(self) -> str:
        """The kernel and its constants, for messages."""
        named = ", ".join(f"{name}={value}" for name, value in self.constants if name.isupper())
        return f"{self.kernel.__name__}({named})"

    def compiled(self, architecture: int) -> Any:
        """Compiles it for a compute capability, 90 for 9.0. From it on, launches overlap as in `Launches`."""
        constants = dict(self.constants) | {"OVERLAP": architecture >= 90}
        types = dict(self.types)
        names = self.kernel.arg_names
        signature = {name: types.get(name, "constexpr") for name in names}
        values = {(at,): constants[name] for at, name in enumerate(names) if name not in types}
        aligned = {
            (at,): [["tt.divisibility", 16]]
            for at, name in enumerate(names)
            if signature[name][0] == "*" and name not in unaligned(self.kernel)
        }
        source = ASTSource(self.kernel, signature, values, aligned)
        target = GPUTarget("cuda", architecture, 32)
        return triton.compile(source, target=target, options={"num_warps": self.warps})


def unaligned(kernel: Any) -> set[str]:
    """The parameters whose alignment a kernel does not know."""
    return {parameter.name for parameter in kernel.params if parameter.do_not_specialize_on_alignment}


class Recorder:
    """Records launches in the place of `Launches`."""

    def __init__(self) -> None:
        self.seen: list[KernelLaunch] = []

    def __call__(
        self, kernel: Any, grid: object, *arguments: Any, warps: int, first: bool = False, **constants: Any
    ) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        types, fixed = {}, {}
        for name, value in given.items():
            kind = value.dtype if isinstance(value, torch.Tensor) else type(value)
            if name in constants or value is None:
                fixed[name] = value
            else:
                types[name] = TYPES[kind]
        self.seen.append(KernelLaunch(kernel, tuple(types.items()), tuple(fixed.items()), warps))


@cache
def recorded(
    dim: int,
    heads: int,
    slots: int,
    kind: str = "text",
    codebooks: int = 4,
    precision: Precision = "reference",
) -> tuple[KernelLaunch, ...]:
    """The launches of a step of a model with one layer, in their order."""
    delays = tuple(range(codebooks))
    lm = language_model(kind, dim=dim, layers=1, heads=heads, delays=delays, dtype=torch.float16).to("meta")
    decoder = Decoder(lm, precision)
    state = DeviceState(decoder, Capacity(slots))
    chain, recorder = Chain(decoder, slots), Recorder()
    device_launches = launches.Launches(torch.device("meta"))
    device_launches.__class__ = type("Recording", (launches.Launches,), {"__call__": recorder.__call__})
    chain._forward(device_launches, state, slots)
    chain._draw(device_launches, state, chain._buffers.logits[:slots], slice(slots))
    return tuple(recorder.seen)


def machine_code(built: Any, folder: Path) -> str:
    """Disassembles a compiled kernel."""
    file = folder / "kernel.cubin"
    file.write_bytes(built.asm["cubin"])
    return subprocess.run(
        [TOOLS / "nvdisasm", "-c", file], capture_output=True, text=True, check=True, timeout=60
    ).stdout


def spilled(built: Any, folder: Path) -> int:
    """The bytes of registers that a compiled kernel keeps in memory for lack of room."""
    file = folder / "kernel.cubin"
    file.write_bytes(built.asm["cubin"])
    said = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", file], capture_output=True, text=True, check=True, timeout=60
    ).stdout
    stack, local = re.search(r"STACK:(\d+)", said), re.search(r"LOCAL:(\d+)", said)
    assert stack and local, said
    return int(stack[1]) + int(local[1])


def instructions(code: str) -> Iterator[str]:
    """The instructions of disassembled code, in their order, without operands."""
    return (found[1] for found in INSTRUCTION.finditer(code))
