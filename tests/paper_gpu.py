"""A GPU of paper: tensors that say that they lie on `cuda:0`, and whose numbers a CPU computes.

With it the very code that runs on a GPU runs where there is none, numbers and all. What a GPU refuses,
it refuses: tensors of two devices in one operation. It tells what a GPU would have made the host wait
for, has a random stream of its own, and autocasts. It cannot tell what no CPU knows: kernels, their
rounding, speed, memory, and what CUDA does not implement.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from paper_graphs import PaperGraph
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only

DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten

_TAKES_A_CPU_INDEX = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
_COPIES = {aten.copy_.default, aten._to_copy.default}
_SIZE_IS_DATA = {aten.nonzero.default, aten.masked_select.default, aten._local_scalar_dense.default}


class GpuTensor(torch.Tensor):
    """Has its numbers in `inner`, on the CPU. A view of it has a view of them."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "GpuTensor":
        with torch.inference_mode(inner.is_inference()):  # a view is what it is a view of
            made: GpuTensor = torch.Tensor._make_wrapper_subclass(
                cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(),
                dtype=inner.dtype, device=DEVICE,
            )  # fmt: skip
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise AssertionError(f"{func}: a tensor of the paper GPU was used without it")

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.inner.untyped_storage()

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def __repr__(self) -> str:  # type: ignore[override]
        return f"GpuTensor({self.inner})"


class PaperGpu(TorchDispatchMode):
    """While it is entered, `cuda` is there. Belongs to the thread that enters it, as all modes do."""

    # As torch's own fake tensors have it: torch then does not look for a driver when it hears `cuda`.
    _mode_key = torch._C._TorchDispatchModeKey.FAKE

    def __init__(self) -> None:
        super().__init__()
        torch._C._ensureCUDADeviceGuardSet()  # where there is no driver, a guard that does nothing
        self.waits: list[str] = []
        """Operations for which the host has waited, since this was last cleared."""
        self.waits_are_errors = False
        self.recording: PaperGraph | None = None
        self.random = torch.Generator().manual_seed(0).get_state()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler to leave us out of it

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd"):
            with self:  # in inference mode such an operation comes here whole
                parts = func.decompose(*args, **kwargs)
            if parts is not NotImplemented:
                return parts
        if func is aten._fused_sdp_choice.default:
            return 0  # "math": made of operations that a CPU has
        given = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        on_gpu = any(isinstance(tensor, GpuTensor) for tensor in given)
        target = kwargs.get("device")
        goes_to_gpu = on_gpu if target is None else torch.device(target).type == "cuda"
        if func is aten.copy_.default:
            goes_to_gpu = isinstance(args[0], GpuTensor)
        _refuse_two_devices(func, args, given)
        if on_gpu or goes_to_gpu:
            self._note_waits(func, args, given, goes_to_gpu)
        if not (on_gpu or goes_to_gpu):
            return func(*args, **kwargs)
        if target is not None:
            kwargs = kwargs | {"device": torch.device("cpu")}
        return self._computed(func, args, kwargs, goes_to_gpu)

    def _computed(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], to_gpu: bool) -> Any:
        wrappers: dict[int, Tensor] = {}

        def opened(tensor: Tensor) -> Tensor:
            inner = tensor.inner if isinstance(tensor, GpuTensor) else tensor
            wrappers[id(inner)] = tensor
            return inner

        def closed(tensor: Tensor) -> Tensor:
            if id(tensor) in wrappers:  # changed in place
                changed = wrappers[id(tensor)]
                assert changed.stride() == tensor.stride(), f"{func}: its shape was changed in place"
                return changed
            return GpuTensor(tensor) if to_gpu else tensor

        args, kwargs = tree_map_only(Tensor, opened, (args, kwargs))
        if func is aten._softmax.default and args[2]:  # from half to float, which only a GPU does in one
            args = (self._noted(aten._to_copy.default)(args[0], dtype=torch.float32), args[1], False)
        with self._drawing() if torch.Tag.nondeterministic_seeded in func.tags else contextlib.nullcontext():
            return tree_map_only(Tensor, closed, self._noted(func)(*args, **kwargs))

    def _noted(self, func: Any) -> Any:
        return func if self.recording is None else self.recording.note(func)

    @contextlib.contextmanager
    def record(self, graph: PaperGraph, **how: Any) -> Iterator[None]:
        """What `torch.cuda.graph` is."""
        assert self.recording is None, "one at a time"
        self.recording = graph
        try:
            yield
        finally:
            self.recording = None
            graph.end()

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """The GPU's own random stream."""
        outside = torch.get_rng_state()
        torch.set_rng_state(self.random)
        try:
            yield
        finally:
            self.random = torch.get_rng_state()
            torch.set_rng_state(outside)

    def _note_waits(self, func: Any, args: tuple[Any, ...], given: Sequence[Tensor], to_gpu: bool) -> None:
        crosses = func in _COPIES and any(isinstance(t, GpuTensor) != to_gpu for t in given)
        by_mask = func in _TAKES_A_CPU_INDEX and any(
            index is not None
            and (index.dtype in (torch.bool, torch.uint8) or not isinstance(index, GpuTensor))
            for index in args[1]
        )
        if crosses or by_mask or func in _SIZE_IS_DATA or func is aten.equal.default:
            self.wait(str(func))

    def wait(self, what: str) -> None:
        if self.recording is not None:
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")
        if self.waits_are_errors:
            raise RuntimeError(f"{what}: called a synchronizing CUDA operation")
        self.waits.append(what)


def _refuse_two_devices(func: Any, args: tuple[Any, ...], given: Sequence[Tensor]) -> None:
    """A CPU's number may stand in for a GPU's; apart from copies and indices nothing else mixes."""
    if func in _COPIES:
        return
    if func in _TAKES_A_CPU_INDEX and isinstance(args[0], GpuTensor):
        given = [args[0], *args[2:3]]
    sides = {isinstance(tensor, GpuTensor) for tensor in given if tensor.dim()}
    if any(isinstance(tensor, GpuTensor) for tensor in given):
        sides.add(True)
        changed = func._schema.arguments[0].alias_info
        if changed is not None and changed.is_write:
            sides.add(isinstance(args[0], GpuTensor))
    if len(sides) == 2:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device, found cuda:0 and cpu")


@contextlib.contextmanager
def paper_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[PaperGpu]:
    """Within, `torch.cuda` finds one GPU, for this thread."""
    gpu = PaperGpu()
    plain_generator = torch.Generator

    class Generator(plain_generator):  # type: ignore[misc, valid-type]
        def __new__(cls, device: Any = "cpu") -> torch.Generator:  # type: ignore[misc]
            return plain_generator()

    def whole(name: str) -> Any:
        """An operation of many, or of others on a GPU: here it is one, and the CPU's."""
        plain = getattr(torch._VF, name)

        def run(*args: Any) -> Any:
            given = [leaf for leaf in tree_flatten(args)[0] if isinstance(leaf, Tensor)]
            there = [tensor for tensor in given if isinstance(tensor, GpuTensor)]
            assert len(there) in (0, len(given)), f"{name}: tensors on two devices"
            made = plain(*tree_map_only(GpuTensor, lambda tensor: tensor.inner, args))
            return tree_map_only(Tensor, GpuTensor, made) if there else made

        return run

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    def wait(*args: Any, **kwargs: Any) -> None:
        gpu.wait("synchronize")

    def within(*args: Any, **kwargs: Any) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    class Event:
        record, synchronize = nothing, nothing

    class Stream:
        synchronize, wait_stream = wait, nothing

    stand_ins = {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0,
        "set_device": nothing, "empty_cache": nothing, "synchronize": wait,
        "mem_get_info": lambda device=None: (80 * 10**9, 80 * 10**9),
        "get_rng_state": lambda device=None: gpu.random,
        "set_rng_state": lambda state, device=None: setattr(gpu, "random", state),
        "current_stream": lambda device=None: Stream(), "Event": Event, "Stream": Stream,
        "stream": within, "device": within, "CUDAGraph": PaperGraph, "graph": gpu.record,
        "set_sync_debug_mode": lambda mode: setattr(gpu, "waits_are_errors", mode == "error"),
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    monkeypatch.setattr(torch, "Generator", Generator)
    for name in ("lstm", "stft"):
        monkeypatch.setattr(torch._VF, name, whole(name))
    overwritten = torch.__future__.get_overwrite_module_params_on_conversion()
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # their type is another one
    lifted = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device) makes it on the CPU and copies it
    try:
        with torch.backends.cudnn.flags(enabled=False), gpu:
            yield gpu
    finally:
        torch._C._set_only_lift_cpu_tensors(lifted)
        torch.__future__.set_overwrite_module_params_on_conversion(overwritten)
