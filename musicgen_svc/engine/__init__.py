"""The decode engine: condition tensors and prompt tokens in, tokens out; knows no audio, text or files.

engine.py       Engine.generate: requests of many threads, in turns
batch.py        what it schedules: open, step, close; of either kind
factory.py      which kind, with what, by device and settings
ragged.py       a cache for each slot, draws on the host: for CPUs
static.py       places on the device, for GPUs; their buffers and their step are in state.py
prefill.py      a request's first pass
decoder.py      one forward over audiocraft's weights
architecture.py what it can decode
projections.py  its matrix products, per device and precision
kv_cache.py     keys and values that never move, of one request or of several side by side
sampling.py     logits to tokens
delays.py       columns to codes and back
operations.py   what a static step does besides most products, in plain PyTorch
kernels.py      the same as Triton kernels; its draws are in sampling_kernels.py
choice.py       which of the two is taken
graphs.py       a static step as one CUDA graph; trial.py: whether it draws the same tokens there
"""
