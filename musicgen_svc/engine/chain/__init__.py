"""A decoding step as a chain of Triton kernels.

chain.py       the step: which kernels it launches, in which order, on what
launches.py    launches kernels one after the other, each of which may start early
tiles.py       how kernels are divided among programs, for each shape
embedding.py   the beginning of the residual stream
product.py     products, with the norm or combination in front of them and what follows
attention.py   attention to a cache
sampling.py    the draw of a column
"""
