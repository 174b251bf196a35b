"""The decode engine: condition tensors and prompt tokens in, tokens out; knows no audio, text or files.

engine.py       Engine.generate, and the slots it is written with: open, step, close
decoder.py      one forward over audiocraft's weights
projections.py  its matrix products, per device and precision
kv_cache.py     keys and values that never move, of one request or of several side by side
sampling.py     logits to tokens
delays.py       columns to codes and back
static.py       slots whose whole state lives on the device, for GPUs
operations.py   what their step does besides products, in plain PyTorch
kernels.py      the same as Triton kernels; its draws are in sampling_kernels.py
choice.py       which of the two an engine takes
graphs.py       their step as one CUDA graph
"""
