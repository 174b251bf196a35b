"""The device that models run on: which one it is, and whether an error means that its memory is used up."""

import torch

from musicgen_svc.errors import ServiceError

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""The words of torch's allocator on a CPU, of CUDA and Triton, and of CUDA's libraries."""


def find_device(name: str) -> torch.device:
    """The device with this name, a GPU with its index. `auto` is the first GPU, else the CPU.

    Raises:
        ServiceError: there is no such device, or it cannot be used.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
        if name == "cpu" and (fault := _gpu_fault()):
            print(f"This runs on the CPU, as the GPU cannot be used: {fault}")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ServiceError(
            f"MUSICGEN_DEVICE is {name!r}; it must be auto, cpu, cuda or cuda:<number>."
        ) from None
    if device.type != "cuda":
        return device
    if not torch.cuda.is_available() and (fault := _gpu_fault()):
        raise ServiceError(f"MUSICGEN_DEVICE is {name!r}, but the GPU cannot be used: {fault}")
    count = torch.cuda.device_count()
    if (device.index or 0) >= count:
        there = (
            f"there are only {count} GPUs"
            if count > 1
            else "there is only one GPU"
            if count
            else "there is no GPU"
        )
        raise ServiceError(
            f"MUSICGEN_DEVICE is {name!r}, but {there} that PyTorch can use: set it to "
            f"{'cuda' if count else 'cpu'} or auto, or check the driver with nvidia-smi."
        )
    return torch.device("cuda", device.index or 0)


def use_device(device: torch.device) -> None:
    """Makes a GPU the calling thread's own.

    Each thread begins with the first GPU, and Triton launches on the thread's GPU, not on a tensor's.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def is_out_of_memory(exc: BaseException) -> bool:
    """Whether an error means that there was no memory, on whichever device."""
    # What asks past torch's allocator on a GPU fails with a plain RuntimeError or an AcceleratorError.
    return isinstance(exc, torch.OutOfMemoryError | MemoryError) or (
        isinstance(exc, RuntimeError) and any(words in str(exc) for words in _OUT_OF_MEMORY)
    )


def _gpu_fault() -> str | None:
    """Why PyTorch cannot use a GPU that is there, such as an old driver. None: there is no GPU."""
    if not torch.cuda.device_count():  # which asks the driver's library, and not CUDA
        return None
    try:
        torch.cuda.current_device()
    except RuntimeError as exc:
        return " ".join(str(exc).split())
    return None
