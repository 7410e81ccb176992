"""BlockLayout: which cells of a token's matrix belong to which semantic block, and in what order.

A model computes on a vector of d cells stored block by block ("cell order"). Only pictures
speak of rows and columns ("matrix order"). `to_matrix` and `to_cells` are the one bridge.
"""

from __future__ import annotations

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


def names_of(n_block: int) -> list[str]:
    """The plan's names of 16 or 8 blocks; B1, B2, … of any other number."""
    return list(NAMES.get(n_block) or (f"B{index + 1}" for index in range(n_block)))


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

    def cells(self, matrix_width: int) -> list[int]:
        """Row-major matrix indices of the block's cells, row by row."""
        rows = range(self.row, self.row + self.height)
        columns = range(self.column, self.column + self.width)
        return [row * matrix_width + column for row in rows for column in columns]


@dataclass(frozen=True)
class BlockLayout:
    """Blocks that tile a matrix. Raises MusotaError where they do not."""

    height: int
    width: int
    blocks: tuple[Block, ...]

    def __post_init__(self):
        rows, columns = self.height, self.width
        for block in self.blocks:
            inside = block.row + block.height <= rows and block.column + block.width <= columns
            if not inside or min(block.row, block.column, block.size - 1) < 0:
                raise MusotaError(f"Block {block.name} lies outside the {rows}×{columns} matrix.")
        if sorted(self.matrix_index) != list(range(rows * columns)):
            raise MusotaError(
                f"The blocks {', '.join(self.names)} overlap or leave a gap: they must tile the "
                f"{rows}×{columns} matrix."
            )

    @classmethod
    @lru_cache
    def of_equal_blocks(cls, n_block: int, size: int) -> BlockLayout:
        """`n_block` blocks of `size` cells, each and the whole as nearly square as can be."""
        height = max(rows for rows in range(1, math.isqrt(size) + 1) if size % rows == 0)
        width = size // height
        grids = [(rows, n_block // rows) for rows in range(1, n_block + 1) if n_block % rows == 0]
        rows, columns = min(grids, key=lambda grid: abs(grid[0] * height - grid[1] * width))
        blocks = [
            Block(name, index // columns * height, index % columns * width, height, width)
            for index, name in enumerate(names_of(n_block))
        ]
        return cls(rows * height, columns * width, tuple(blocks))

    @classmethod
    @lru_cache
    def standard(cls, matrix_size: int, n_block: int) -> BlockLayout:
        """The layout of `n_block` blocks: equal rectangles in the most nearly square grid (the
        wider blocks where two are equally square), or the plan's 6×6 with 8.

        Raises MusotaError where no grid of equal rectangles exists.
        """
        bands = UNEVEN.get((matrix_size, n_block))
        if not bands:
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
            bands = [[matrix_size // columns] * columns] * rows
        names = iter(names_of(n_block))
        height = matrix_size // len(bands)
        blocks = [
            Block(next(names), band * height, sum(widths[:place]), height, width)
            for band, widths in enumerate(bands)
            for place, width in enumerate(widths)
        ]
        return cls(matrix_size, matrix_size, tuple(blocks))

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

    @cached_property
    def matrix_index(self) -> tuple[int, ...]:
        """Row-major matrix index of each cell, in cell order."""
        return tuple(cell for block in self.blocks for cell in block.cells(self.width))

    def to_matrix(self, cells):
        """(..., C) in cell order to (..., height, width); for tensors and arrays alike."""
        inverse = np.argsort(self.matrix_index)
        return cells[..., inverse].reshape(*cells.shape[:-1], self.height, self.width)

    def to_cells(self, matrix):
        """(..., height, width) to (..., C) in cell order; the inverse of `to_matrix`."""
        flat = matrix.reshape(*matrix.shape[:-2], self.height * self.width)
        return flat[..., list(self.matrix_index)]
