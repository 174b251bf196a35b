"""How the products and the attention of a step are divided among the programs of a GPU: one table for each.

Measured on: nothing yet. The numbers follow from these considerations for an H200 (132 processors, each with
228 KB of shared memory) and hold for smaller GPUs, whose programs may have 99 KB:

- A program multiplies 16 rows of the weight, the height of a tensor core's tile. Fewer would leave tensor
  cores idle, more would leave processors idle: a `small` model's smallest product has 64 programs.
- The first tile of the weight is loaded before the program waits for the one in front of it. So with few rows
  a tile holds whole rows of the weight up to 2,048 inputs, and a program has one warp for each 256 inputs.
  Of longer rows a tile holds 1,024 inputs: with 2,048 the program would take so many registers that it could
  not begin while the one in front of it runs.
- With many rows the tile of the inputs is the larger one, and each program loads all of it. A tile then holds
  512 inputs, and the products with the most outputs have 32 rows of the weight a program. These have 256
  inputs from 17 rows on, and twice as many warps, because four warps would spill registers.
"""

from typing import NamedTuple

import triton  # type: ignore[import-untyped]

OVERLAPPING = (9, 0), (12, 0)
"""The compute capabilities, from the first to below the second, with which a launch starts before the one in
front of it has ended. From 12.0 on it could too, but recording such launches was reported to fail there."""

LEAST_CAPABILITY = (8, 0)
"""Below this compute capability the products would not use tensor cores."""

FEW_ROWS = 8
"""Up to this number of rows, a product computes the LayerNorm in front of it itself, in every program.

Beyond it a launch of its own computes the norm once.
"""

WHOLE = 2048
"""Up to this number of inputs, a tile may hold whole rows of the weight, as a norm in front of it needs."""


class Tile(NamedTuple):
    """How a product is divided."""

    outputs: int
    """Rows of the weight for each program."""
    inputs: int
    """Columns of the weight that a program loads at once. Each warp multiplies its share of them."""
    warps: int


FEW: dict[tuple[int, int], Tile] = {
    # (inputs, outputs) of the weight: tile         # programs
    # small
    (1024, 3072): Tile(16, 1024, 4),  # 192
    (1024, 1024): Tile(16, 1024, 4),  # 64
    (1024, 4096): Tile(16, 1024, 4),  # 256
    (4096, 1024): Tile(16, 1024, 4),  # 64, each in 4 tiles
    (1024, 8192): Tile(32, 1024, 4),  # 256
    # medium and melody
    (1536, 4608): Tile(16, 2048, 8),  # 288
    (1536, 1536): Tile(16, 2048, 8),  # 96
    (1536, 6144): Tile(16, 2048, 8),  # 384
    (6144, 1536): Tile(16, 1024, 4),  # 96, each in 6 tiles
    (1536, 8192): Tile(16, 2048, 8),  # 512
    # large
    (2048, 6144): Tile(16, 2048, 8),  # 384
    (2048, 2048): Tile(16, 2048, 8),  # 128
    (2048, 8192): Tile(16, 2048, 8),  # 512, also the heads
    (8192, 2048): Tile(16, 1024, 4),  # 128, each in 8 tiles
    # the heads of stereo models
    (1024, 16384): Tile(32, 1024, 4),  # 512
    (1536, 16384): Tile(16, 2048, 8),  # 1,024
    (2048, 16384): Tile(16, 2048, 8),  # 1,024
}
"""The tiles of products with up to `FEW_ROWS` rows, for the released models."""

MANY_OUTPUTS = 4096
"""With more than `FEW_ROWS` rows, a product with at least as many outputs has larger programs."""


def product_tile(inputs: int, outputs: int, rows: int) -> Tile:
    """Chooses the tile of a product.

    Args:
        inputs, outputs: the shape of the weight [outputs, inputs].
        rows: how many rows are multiplied by it.
    """
    if rows > FEW_ROWS:
        own = 32 if outputs >= MANY_OUTPUTS else 16
        room = 16 * 16384 // own // triton.next_power_of_2(rows)  # more would not fit the registers
        block = max(min(512, room, triton.next_power_of_2(inputs)), 16)
        return Tile(own, block, min(4 if room >= 512 else 8, block // 16))
    if (inputs, outputs) in FEW:
        return FEW[inputs, outputs]
    # A model of another size: each warp multiplies 256 inputs, or all there are.
    block = max(min(triton.next_power_of_2(inputs), WHOLE), 16)
    return Tile(16, block, max(block // 256, 1))


class Split(NamedTuple):
    """How the attention to a cache is divided."""

    parts: int
    """Programs for each head of each row. Each computes its share of the positions that are in use."""
    positions: int
    """Positions that a program loads at once."""
    warps: int


def attention_split(rows: int, heads: int, dim: int) -> Split:
    """Chooses how self-attention is divided.

    At least 128 programs read a cache, one for each processor of a large GPU, because most of the positions
    should be on their way at once. More parts would cost more in the product that combines them.
    """
    readers = rows * heads
    if rows > FEW_ROWS or readers > 96 or dim > WHOLE:
        return Split(1, 128, 4)
    return Split(4 if readers <= 48 else 2, 128, 8)


TEXT_SPLIT = Split(1, 64, 2)
"""How cross-attention is divided: most texts have fewer tokens than this."""
