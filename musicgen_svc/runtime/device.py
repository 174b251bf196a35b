"""Chooses the device that models run on, and recognizes the errors that mean that its memory is used up."""

import torch

from musicgen_svc.errors import ServiceError

_OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "ALLOC_FAILED", "ALLOCATION_FAILED")
"""Words in the messages of torch's allocator on a CPU, of CUDA and Triton, and of CUDA's libraries."""
_NO_MEMORY_FOR_CODE = "could not create a primitive"
"""The whole message of oneDNN when it has no memory for the code that it generates.

When it lacks an operation, the message goes on with "descriptor"."""


def find_device(name: str) -> torch.device:
    """Returns the device with this name; a GPU always has an index.

    Args:
        name: `cpu`, `cuda`, `cuda:<number>`, or `auto`: the first GPU, else the CPU.

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
    """Makes a GPU the current device of the calling thread. Does nothing for a CPU.

    A new thread's current device is the first GPU, and Triton launches on the current device, not on that of
    its tensors.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)


def set_fp32_precision() -> None:
    """Makes a GPU multiply fp32 numbers in TF32 in convolutions and LSTMs, and in fp32 elsewhere.

    These are PyTorch's defaults, with which audiocraft runs. The environment could change them: with
    TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1, T5 and all other matrix products of fp32 numbers would be in TF32. It
    rounds the factors to 11 significant bits; docs/speed.md has what EnCodec loses by it.
    """
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = False


def is_out_of_memory(exc: BaseException) -> bool:
    """Tells whether an error means that a device, or the host, had no memory left."""
    # On a GPU, memory that torch's allocator does not manage fails with a RuntimeError or AcceleratorError.
    return isinstance(exc, torch.OutOfMemoryError | MemoryError) or (
        isinstance(exc, RuntimeError)
        and (str(exc) == _NO_MEMORY_FOR_CODE or any(words in str(exc) for words in _OUT_OF_MEMORY))
    )


def _gpu_fault() -> str | None:
    """Returns why PyTorch cannot use a GPU that is there, such as an old driver, or None."""
    if not torch.cuda.device_count():  # asks the driver's library and does not need CUDA
        return None
    try:
        torch.cuda.current_device()
    except RuntimeError as exc:
        return " ".join(str(exc).split())
    return None
