"""What fits into the device's memory: how many bytes of models, and how many requests at once."""

import torch

from musicgen_svc.runtime.machine import memory_bytes
from musicgen_svc.runtime.slots import slots_on_cpu, slots_on_gpu

GB = 10**9
WORKING_SPACE_CPU = 4 * GB
"""Memory for everything except weights: Python, libraries, a request's activations, keys and values."""
WORKING_SPACE_GPU = 2 * GB
"""Memory for everything except weights and the engine's buffers: a request's activations."""


def budget(device: torch.device, gigabytes: float) -> int:
    """Returns the bytes for models: `gigabytes`, or for 0 the device's memory minus working space.

    On a device with little memory, the working space is a quarter of it.
    """
    if gigabytes:
        return round(gigabytes * GB)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free - min(free // 4, WORKING_SPACE_GPU)
    available = memory_bytes()
    return available - min(available // 4, WORKING_SPACE_CPU)


def slots(device: torch.device) -> int:
    """Returns how many requests the device's memory holds at once."""
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return slots_on_gpu(total / GB)
    return slots_on_cpu(memory_bytes() / GB)
