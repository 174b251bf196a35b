"""Compiles the kernels that a step launches to machine code, for GPUs that need not be there.

The launches are recorded from a step on PyTorch's meta device, so they are those of the product: the types,
the constants and the number of warps are not written down again here.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton  # type: ignore[import-untyped]
from torch import Tensor
from triton.backends.compiler import GPUTarget  # type: ignore[import-untyped]
from triton.compiler import ASTSource  # type: ignore[import-untyped]

from benchmarks.random_models import MONO, SIZES, STEREO, language_model
from musicgen_svc.engine.chain import tiles
from musicgen_svc.engine.chain.chain import Chain
from musicgen_svc.engine.chain.launches import Launches
from musicgen_svc.engine.decoder import Decoder
from musicgen_svc.engine.projections import Precision
from musicgen_svc.engine.state import Capacity, DeviceState

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.float32: "*fp32",
    torch.long: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    int: "i32",
    float: "fp32",
}
SHARED_KB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Architectures, and how much shared memory a program may have there."""
OVERLAPPING = range(*(10 * major + minor for major, minor in tiles.OVERLAPPING))
"""The architectures on which launches overlap."""
WAIT = "ACQBULK"
"""The machine instruction of `griddepcontrol.wait`, on every architecture that has it."""
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

    def __getitem__(self, constant: str) -> Any:
        return dict(self.constants)[constant]

    def compiled(self, architecture: int) -> Any:
        """Compiles it for a compute capability, 90 for 9.0."""
        constants = dict(self.constants) | {"OVERLAP": architecture in OVERLAPPING}
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


class Memory(NamedTuple):
    """The cells of a tensor."""

    storage: int
    first: int
    end: int

    @classmethod
    def of(cls, tensor: Tensor) -> "Memory":
        first = tensor.storage_offset()
        spread = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
        return cls(tensor.untyped_storage()._cdata, first, first + spread + 1)

    def overlaps(self, other: "Memory") -> bool:
        return self.storage == other.storage and self.first < other.end and other.first < self.end


class Recorder(Launches):
    """Records launches, and launches nothing.

    Attributes:
        seen: the launches.
        memory: the tensors that each got, by parameter.
    """

    def __init__(self) -> None:
        super().__init__(torch.device("meta"))
        self.seen: list[KernelLaunch] = []
        self.memory: list[dict[str, Memory]] = []

    def __call__(
        self, kernel: Any, grid: object, *arguments: Any, warps: int, first: bool = False, **constants: Any
    ) -> None:
        given = dict(zip(kernel.arg_names, arguments, strict=False)) | constants
        types, fixed, memory = {}, {}, {}
        for name, value in given.items():
            if isinstance(value, Tensor):
                memory[name] = Memory.of(value)
            if name in constants or value is None:
                fixed[name] = value
            else:
                types[name] = TYPES[value.dtype if isinstance(value, Tensor) else type(value)]
        self.seen.append(KernelLaunch(kernel, tuple(types.items()), tuple(fixed.items()), warps))
        self.memory.append(memory)


@cache
def recorded(
    slots: int,
    *,
    dim: int,
    heads: int,
    kind: str = "text",
    delays: tuple[int, ...] = MONO,
    precision: Precision = "reference",
    layers: int = 1,
) -> Recorder:
    """Records the launches of a step of a model with random weights, first those of the forward pass."""
    lm = language_model(
        kind, dim=dim, layers=layers, heads=heads, delays=delays, dtype=torch.float16, device="meta"
    )
    decoder = Decoder(lm, precision)
    state = DeviceState(decoder, Capacity(slots))
    chain, recorder = Chain(decoder, slots), Recorder()
    chain._forward(recorder, state, slots)
    chain._draw(recorder, state, chain._buffers.logits[:slots], slice(slots))
    return recorder


@cache
def released_launches() -> tuple[KernelLaunch, ...]:
    """The distinct launches of a step of the released models, for each number of slots and precision."""
    distinct: dict[KernelLaunch, None] = {}
    precisions: tuple[Precision, ...] = ("reference", "int8")
    for size, delays, slots, precision in product(
        SIZES.values(), (MONO, STEREO), (1, 2, 4, 8, 16), precisions
    ):
        shape = {key: value for key, value in size.items() if key != "layers"}
        distinct |= dict.fromkeys(recorded(slots, delays=delays, precision=precision, **shape).seen)  # type: ignore[arg-type]
    return tuple(distinct)


@dataclass(frozen=True)
class Build:
    """What a compiled kernel needs, and what it does before it waits for the launch in front of it."""

    launch: KernelLaunch
    architecture: int
    spilled: int  # bytes of registers that are kept in memory for lack of room
    shared: int  # bytes of shared memory
    early: tuple[str, ...]  # instructions that load from memory before the wait; empty if it never waits
    source_early: tuple[frozenset[str], ...]  # the parameters from which each early load of the source reads
    stored: frozenset[str]  # the parameters to which it stores

    @property
    def early_bytes(self) -> int:
        """How many bytes each thread loads before the wait."""
        return sum(width(each) for each in self.early)

    @property
    def faults(self) -> list[str]:
        """What is wrong, in words."""
        found = []
        if self.spilled:
            found.append(f"{self.spilled} bytes of registers are spilled")
        if self.shared > SHARED_KB[self.architecture] * 1024:
            found.append(f"{self.shared} bytes of shared memory are more than there are")
        if self.architecture in OVERLAPPING:
            if self.early_bytes < tile_bytes(self.launch):
                found.append(f"only {self.early_bytes} bytes are loaded before the wait by each thread")
            if len(self.early) > len(self.source_early):
                found.append("a load was moved before the wait by the compiler")
        return [f"{self.launch.name} for sm_{self.architecture}: {fault}" for fault in found]


def tile_bytes(launch: KernelLaunch) -> int:
    """How many bytes each thread must load before the wait: its share of the tile that no step writes."""
    threads, types = 32 * launch.warps, dict(launch.types)
    size = {"*fp16": 2, "*bf16": 2, "*fp32": 4, "*i8": 1}
    if launch.kernel.__name__ == "product":
        return launch["BLOCK_OUT"] * launch["BLOCK_IN"] * size[types["weight"]] // threads
    if launch.kernel.__name__ == "attend":
        return 2 * launch["TILE"] * launch["HEAD"] * size[types["keys"]] // threads
    return 0


@cache
def build(launch: KernelLaunch, architecture: int) -> Build:
    """Compiles a kernel, and reads its machine code."""
    built = launch.compiled(architecture)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = tool("cuobjdump", "-res-usage", file.name)
        stack, local = re.search(r"STACK:(\d+)", usage), re.search(r"LOCAL:(\d+)", usage)
        assert stack and local, usage
        code = tool("nvdisasm", "-c", file.name) if architecture in OVERLAPPING else ""
    source_early, stored = source_accesses(built.asm["ptx"], [name for name, _ in launch.types])
    return Build(
        launch, architecture, int(stack[1]) + int(local[1]), built.metadata.shared, early_loads(code),
        source_early, stored,
    )  # fmt: skip


def tool(name: str, *arguments: str) -> str:
    """The output of one of the tools that Triton's package carries."""
    return subprocess.run(
        [TOOLS / name, *arguments], capture_output=True, text=True, check=True, timeout=120
    ).stdout


def instructions(code: str) -> Iterator[str]:
    """The instructions of disassembled code, in their order, without operands."""
    return (found[1] for found in INSTRUCTION.finditer(code))


def early_loads(code: str) -> tuple[str, ...]:
    """The instructions of disassembled code that load from memory and stand before the wait."""
    own = list(instructions(code))
    early = own[: own.index(WAIT)] if WAIT in own else []
    return tuple(each for each in early if each.split(".")[0] in ("LDG", "LDGSTS", "LD"))


def width(instruction: str) -> int:
    """How many bytes an instruction loads, by its suffixes."""
    parts = instruction.split(".")
    bits = {"256": 256, "128": 128, "64": 64, "U16": 16, "S16": 16, "U8": 8, "S8": 8}
    return next((bits[part] for part in parts if part in bits), 32) // 8


def source_accesses(ptx: str, parameters: list[str]) -> tuple[tuple[frozenset[str], ...], frozenset[str]]:
    """Finds by which parameters a kernel's intermediate code (PTX) reads and writes memory.

    Each register of the code is written once or in a loop, so the parameters from which an address was
    computed are found in one pass in the order of the code. What was loaded counts as no parameter.

    Args:
        ptx: the code.
        parameters: the names of the kernel's parameters that are no constants, in their order.

    Returns:
        tuple: for each load before the wait the parameters in its address (none if there is no wait), and the
            parameters in the addresses of all stores.
    """
    origin: dict[str, frozenset[str]] = {}
    early: list[frozenset[str]] = []
    stored: frozenset[str] = frozenset()
    waited = False
    for line in ptx.splitlines():
        text = re.sub(r"^\s*(@!?%p\d+)?\s*", "", line.split("//")[0])
        registers = re.findall(r"%\w+", text)
        if text.startswith("ld.param"):
            number = re.search(r"_param_(\d+)", text)
            assert number
            at = int(number[1])
            origin[registers[0]] = frozenset(parameters[at : at + 1])
        elif text.startswith("ld.global"):
            address = re.findall(r"%\w+", text[text.rindex("[") :])
            if not waited:
                early.append(origin.get(address[0], frozenset()))
            origin |= dict.fromkeys(registers[:-1], frozenset())
        elif text.startswith(("st.global", "red.", "atom.")):
            stored |= origin.get(registers[0], frozenset())
        elif text.startswith("griddepcontrol.wait"):
            waited = True
        elif registers:
            sources = [origin.get(each, frozenset()) for each in registers[1:]]
            origin[registers[0]] = origin.get(registers[0], frozenset()).union(*sources)
    return tuple(early) if waited else (), stored
