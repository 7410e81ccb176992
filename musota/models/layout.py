"""BlockLayout: the semantic blocks of a token's matrix. Models compute on channels stored block by
block; pictures show the matrix."""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import count, groupby

import numpy as np

from musota.errors import MusotaError

SEMANTIC_NAMES = {
    "I": "identity",
    "S": "structure",
    "C1": "local context",
    "C2": "global context",
    "R1": "syntactic relations",
    "R2": "semantic relations",
    "T": "transformation",
    "K": "knowledge",
    "G": "global coherence",
    "M": "modality",
    "D": "discourse",
    "F": "frame",
    "P": "position",
    "E": "entity",
    "A": "affect",
    "X": "extension",
}
NAMES = {16: tuple(SEMANTIC_NAMES), 8: ("I", "S", "C1", "R1", "R2", "T", "K", "G")}


@dataclass(frozen=True)
class Block:
    """A named rectangle of the matrix: its top-left corner, height and width."""

    name: str
    row: int
    column: int
    height: int
    width: int

    @property
    def size(self) -> int:
        return self.height * self.width

    @property
    def title(self) -> str:
        return SEMANTIC_NAMES.get(self.name, self.name)


@dataclass(frozen=True)
class BlockLayout:
    """The blocks that tile a matrix of `height` × `width` channels."""

    height: int
    width: int
    blocks: tuple[Block, ...]

    @classmethod
    def of_bands(cls, height: int, bands: list[list[int]]) -> "BlockLayout":
        """The layout of horizontal bands of equal height, given the widths of their blocks. Sixteen
        or eight blocks have the plan's names, other numbers B1, B2, …."""
        names = iter(NAMES.get(sum(map(len, bands))) or map("B{}".format, count(1)))
        blocks = [
            Block(next(names), band * height, sum(widths[:place]), height, width)
            for band, widths in enumerate(bands)
            for place, width in enumerate(widths)
        ]
        return cls(height * len(bands), sum(bands[0]), tuple(blocks))

    @classmethod
    @lru_cache
    def of_equal_blocks(cls, n_block: int, size: int) -> "BlockLayout":
        """The layout of `n_block` blocks of `size` channels in which the matrix, and then a block,
        is as nearly square as possible; no block is higher than wide."""
        heights = [each for each in range(math.isqrt(size), 0, -1) if size % each == 0]
        rows = [each for each in range(1, n_block + 1) if n_block % each == 0]
        # of the matrix: its height is height × n_row, its width the rest of n_block × size
        excess = {(h, n): abs(h * n - n_block * size / (h * n)) for h in heights for n in rows}
        height, n_row = min(excess, key=excess.get)
        return cls.of_bands(height, [[size // height] * (n_block // n_row)] * n_row)

    @classmethod
    def standard(cls, matrix_size: int, n_block: int) -> "BlockLayout":
        """MU-SOTA's layout of `n_block` equal rectangles, or the plan's 6×6 matrix with 8 blocks.
        Raises MusotaError where no grid of equal rectangles exists."""
        if (matrix_size, n_block) == (6, 8):  # 36 channels do not split into 8 equal blocks
            return cls.of_bands(2, [[2, 2, 2], [2, 2, 2], [3, 3]])
        if matrix_size**2 % n_block:
            tile = f"{n_block} equal blocks do not tile a {matrix_size}×{matrix_size} matrix"
            raise MusotaError(f"{tile}: use 8×8 with 16 or 8 blocks, or 6×6 with 8.")
        return cls.of_equal_blocks(n_block, matrix_size**2 // n_block)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.blocks)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(block.size for block in self.blocks)

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(number of blocks, channels of each) for every run of neighbouring blocks of one size."""
        return tuple((len(list(run)), size) for size, run in groupby(self.sizes))

    def to_matrix(self, channels):
        """(..., C) channels to (..., height, width), for tensors and arrays."""
        index, first = np.empty((self.height, self.width), int), 0
        for b in self.blocks:
            own = np.arange(first, first + b.size).reshape(b.height, b.width)
            index[b.row : b.row + b.height, b.column : b.column + b.width] = own
            first += b.size
        return channels[..., index]
