"""BlockLayout: which cells of a token's matrix belong to which semantic block, and in what order.

A model computes on a vector of d cells stored block by block ("cell order"). Only pictures
speak of rows and columns ("matrix order"); `to_matrix` is the one bridge.
"""

import math
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

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
UNEVEN = {(6, 8): [[2, 2, 2], [2, 2, 2], [3, 3]]}  # 36 cells do not split into 8 equal blocks


@dataclass(frozen=True)
class Block:
    """A named rectangle of the matrix: its top-left cell and its height and width."""

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
    """Blocks that tile a matrix."""

    height: int
    width: int
    blocks: tuple[Block, ...]

    @classmethod
    def of_bands(cls, height: int, bands: list[list[int]]) -> "BlockLayout":
        """Bands of blocks of one height, from their widths. Sixteen or eight blocks bear the plan's
        names, any other number B1, B2, …."""
        total = sum(map(len, bands))
        names = iter(NAMES.get(total) or [f"B{number}" for number in range(1, total + 1)])
        blocks = [
            Block(next(names), band * height, sum(widths[:place]), height, width)
            for band, widths in enumerate(bands)
            for place, width in enumerate(widths)
        ]
        return cls(height * len(bands), sum(bands[0]), tuple(blocks))

    @classmethod
    @lru_cache
    def of_equal_blocks(cls, n_block: int, size: int) -> "BlockLayout":
        """`n_block` blocks of `size` cells, each and the whole as nearly square as can be."""
        height = max(rows for rows in range(1, math.isqrt(size) + 1) if size % rows == 0)
        width = size // height
        grids = [(rows, n_block // rows) for rows in range(1, n_block + 1) if n_block % rows == 0]
        rows, columns = min(grids, key=lambda grid: abs(grid[0] * height - grid[1] * width))
        return cls.of_bands(height, [[width] * columns] * rows)

    @classmethod
    @lru_cache
    def standard(cls, matrix_size: int, n_block: int) -> "BlockLayout":
        """The layout of `n_block` blocks: equal rectangles in the most nearly square grid (the
        wider blocks where two are equally square), or the plan's 6×6 with 8.

        Raises MusotaError where no grid of equal rectangles exists.
        """
        if (matrix_size, n_block) in UNEVEN:
            return cls.of_bands(2, UNEVEN[matrix_size, n_block])
        grids = [
            (rows, n_block // rows)
            for rows in range(n_block, 0, -1)
            if n_block % rows == matrix_size % rows == matrix_size % (n_block // rows) == 0
        ]
        if not grids:
            raise MusotaError(
                f"{n_block} equal blocks do not tile a {matrix_size}×{matrix_size} matrix: use "
                "8×8 with 16 or 8 blocks, or 6×6 with 8."
            )
        rows, columns = min(grids, key=lambda grid: abs(grid[0] - grid[1]))
        return cls.of_bands(matrix_size // rows, [[matrix_size // columns] * columns] * rows)

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(block.name for block in self.blocks)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        return tuple(block.size for block in self.blocks)

    @cached_property
    def groups(self) -> tuple[tuple[int, int], ...]:
        """(how many, cells of each) for every run of neighbouring blocks of one size."""
        return tuple((len(list(run)), size) for size, run in groupby(self.sizes))

    def to_matrix(self, cells):
        """(..., C) in cell order to (..., height, width); for tensors and arrays alike."""
        place = np.arange(self.height * self.width).reshape(self.height, self.width)
        stored = [
            place[b.row : b.row + b.height, b.column : b.column + b.width].ravel()
            for b in self.blocks
        ]
        inverse = np.argsort(np.concatenate(stored))
        return cells[..., inverse].reshape(*cells.shape[:-1], self.height, self.width)
