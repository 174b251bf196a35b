"""How many requests a device decodes at once, by its memory."""

GPU_LARGE_GB, GPU_REQUEST_GB = 14.0, 1.8
"""Memory of a GPU for `large` and all its parts, 4 GB of it for MultiBand Diffusion; and for each request."""
GPU_MOST = 16
CPU_LARGE_GB, CPU_REQUEST_GB = 19.0, 2.4
"""The same on a CPU, where weights, keys and values are float32."""
CPU_MOST = 4
"""More requests at once decode no faster on a CPU: attention, draws and codecs take turns there."""


def slots_on_gpu(memory_gb: float) -> int:
    """Returns how many requests a GPU with this much memory, in units of 10^9 bytes, decodes at once."""
    return _slots(memory_gb, GPU_LARGE_GB, GPU_REQUEST_GB, GPU_MOST)


def slots_on_cpu(memory_gb: float) -> int:
    """Returns how many requests a CPU with this much memory, in units of 10^9 bytes, decodes at once."""
    return _slots(memory_gb, CPU_LARGE_GB, CPU_REQUEST_GB, CPU_MOST)


def _slots(memory_gb: float, large_gb: float, request_gb: float, most: int) -> int:
    """Returns the largest power of two that fits beside `large`; at least 1.

    A GPU's steps are recorded for 1, 2, 4, 8 and 16 requests.
    """
    held = min(max(1, int((memory_gb - large_gb) / request_gb)), most)
    return 1 << (held.bit_length() - 1)
