"""The decode engine: computes tokens from condition tensors and prompt tokens; knows no audio, text or files.

engine.py            Engine.generate: requests of many threads, decoded together
batch.py             the protocol of a batch: slots that are opened, stepped and closed
factory.py           chooses the batch and its steps by device and settings
ragged.py            the batch for a CPU: a cache per slot, tokens drawn on the host
static.py            the batch for a GPU: all slots on the device
state.py             the buffers of a static batch, and the protocol of a step
plain_step.py        the step of a static batch in plain PyTorch
chain                the same step as a chain of Triton kernels
prefill.py           the first pass of a request
decoder.py           one forward pass over audiocraft's weights
layers.py            the weights of a layer, bound to the functions that read them
architecture.py      checks that a model is built like the released ones
projections.py       matrix products, per device and precision
memory.py            how many bytes an engine takes, before the model is loaded
kv_cache.py          keys and values of one request, and attention over those of several
sampling.py          draws tokens from logits
sampling_params.py   how the tokens of a request are drawn
delays.py            converts codes to delayed columns and back
graphs.py            records a step as a CUDA graph and replays it
selftest.py          tests at load whether kernels and graphs work on this machine
"""
