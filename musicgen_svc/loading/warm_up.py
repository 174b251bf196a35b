"""Runs what was loaded onto a GPU once, so that its first request takes no longer than the next ones.

The first use of an operation on a GPU costs more than its computation. What it prepares belongs to the
process or to a thread:

- To the process belong the libraries that PyTorch loads when they are first used, their kernels, each of
  which CUDA loads when it is first launched (CUDA C++ Programming Guide, "Lazy Loading"), the memory that
  PyTorch's allocator keeps, and the recorded step of the engine. One run prepares them for all threads.
- To a thread belong its handles of cuBLAS and cuDNN (PyTorch's `ATen/cuda/CublasHandlePool.cpp` and
  `ATen/cudnn/Handle.cpp`; a thread that ends leaves them to another), the workspace of a handle for each
  stream, and a plan for each shape of a convolution (the `thread_local` cache in
  `ATen/native/cudnn/Conv_v8.cpp`). A run in the thread that loads does not prepare these for the threads of
  requests: the first request of each thread makes the handles, and a request whose audio has a length that
  is new to its thread makes the plans.

Libraries choose kernels by shape. So the audio is as long as that of a request with the default `duration`.
The engine decodes only a few tokens, because its steps have the same shapes in every request.
"""

import gc
import time
from collections.abc import Callable
from functools import partial

import torch

from musicgen_svc.engine.batch import DecodeRequest
from musicgen_svc.engine.sampling_params import SamplingParams
from musicgen_svc.errors import first_line
from musicgen_svc.loading.model import Model
from musicgen_svc.models.encodec import Codec
from musicgen_svc.models.multiband_diffusion import MultiBandDiffusion
from musicgen_svc.runtime.device import is_out_of_memory
from musicgen_svc.runtime.randomness import GlobalRandom

PROMPT = "a slow piano melody over soft strings and a warm bass"
SECONDS = 8
"""The length of the audio: the default `duration`."""
DIFFUSION_SECONDS = 1
"""The length for MultiBand Diffusion, which takes many times as long as EnCodec."""
FRAMES = 32
"""How many frames the engine decodes."""
LEVEL = 0.1
"""The value of all samples. It is not 0, because Demucs does not compute silence beside other audio."""


def warm_up_model(model: Model, device: torch.device) -> None:
    """Runs a language model and its parts once on a GPU, and prints how long that took.

    It runs what requests run: T5, Demucs if the model takes melodies, the prefill and the steps of one slot,
    and EnCodec in both directions. Does nothing on a CPU. The caller must hold the device, and no slot of the
    engine may be open. The process's random streams are the same afterwards.

    If the device has too little memory left, a sentence is printed and the model can be used: another request
    may need less. Any other error is raised, because requests would end with it too; so it is better to know
    it before the service is called ready.

    Args:
        model: has just been loaded.
        device: where it is.

    Raises:
        Exception: of any class.
    """
    _run_once(f"model_version {model.name!r}", device, partial(_run_model, model))


def warm_up_codec(codec: Codec, device: torch.device) -> None:
    """Runs a codec without a language model once, like `warm_up_model`."""
    _run_once("The codec", device, partial(_run_codec, codec))


def warm_up_diffusion(diffusion: MultiBandDiffusion, codec: Codec, device: torch.device) -> None:
    """Runs MultiBand Diffusion once on tokens of its codec, like `warm_up_model`."""
    tokens = torch.zeros(codec.codebooks, int(DIFFUSION_SECONDS * codec.frame_rate), dtype=torch.long)
    _run_once("MultiBand Diffusion", device, partial(diffusion.decode, tokens))


def _run_once(what: str, device: torch.device, run: Callable[[], object]) -> None:
    """Calls `run` on a GPU, and prints how long it took, or that the device has too little memory."""
    if device.type != "cuda":
        return
    began_s = time.monotonic()
    try:
        with GlobalRandom(0, device).pinned():
            run()
        torch.cuda.synchronize(device)
    except Exception as exc:
        if not is_out_of_memory(exc):
            raise
        print(
            f"{what} was not run before its first request, which will take longer, because the device has "
            f"too little memory: {first_line(exc)}"
        )
    else:
        print(f"{what} was run once before its first request, in {time.monotonic() - began_s:.1f} s.")
        return
    gc.collect()  # not within `except`, where the frames of the error still hold tensors
    torch.cuda.empty_cache()


def _run_model(model: Model) -> None:
    """Runs all parts of a model in the order of a request."""
    wav = _audio(model.codec)
    melody = wav.mean(0, keepdim=True) if model.conditioner.takes_melody else None
    conditions = model.conditioner.text(PROMPT) | model.conditioner.melody(melody)
    length, generator = min(FRAMES, model.window), torch.Generator().manual_seed(0)
    batch = model.engine.batch
    slot = batch.open(DecodeRequest(conditions, None, length, SamplingParams(), generator))
    try:
        while slot.running:
            batch.run()
    finally:
        batch.close(slot)
    _run_codec(model.codec)


def _run_codec(codec: Codec) -> None:
    """Encodes audio, and decodes its tokens at once and in the pieces of live audio."""
    tokens = codec.encode(_audio(codec))
    codec.decode(tokens)
    stream = codec.stream()
    for pieces in (stream.push(tokens), stream.finish()):
        for _ in pieces:
            pass


def _audio(codec: Codec) -> torch.Tensor:
    """Returns [C, T] samples on the CPU."""
    return torch.full((codec.channels, SECONDS * codec.sample_rate), LEVEL)
