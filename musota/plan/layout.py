"""BlockLayout: which cells of a token's matrix belong to which semantic block, and in what order.

A model computes on a vector of d = m² cells stored block by block ("cell order"). Only pictures
speak of rows and columns ("matrix order"). `to_matrix` and `to_cells` are the one bridge.
"""

from __future__ import annotations

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

    def cells(self, matrix_size: int) -> list[int]:
        """Row-major matrix indices of the block's cells, row by row."""
        rows = range(self.row, self.row + self.height)
        columns = range(self.column, self.column + self.width)
        return [row * matrix_size + column for row in rows for column in columns]


@dataclass(frozen=True)
class BlockLayout:
    """Blocks that tile an m×m matrix. Raises MusotaError where they do not."""

    matrix_size: int
    blocks: tuple[Block, ...]

    def __post_init__(self):
        m = self.matrix_size
        for block in self.blocks:
            inside = block.row + block.height <= m and block.column + block.width <= m
            if not inside or min(block.row, block.column, block.size - 1) < 0:
                raise MusotaError(f"Block {block.name} lies outside the {m}×{m} matrix.")
        if sorted(self.matrix_index) != list(range(m * m)):
            raise MusotaError(
                f"The blocks {', '.join(self.names)} overlap or leave a gap: they must tile the "
                f"{m}×{m} matrix."
            )

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
        names = iter(NAMES.get(n_block) or [f"B{index + 1}" for index in range(n_block)])
        height = matrix_size // len(bands)
        blocks = [
            Block(next(names), band * height, sum(widths[:place]), height, width)
            for band, widths in enumerate(bands)
            for place, width in enumerate(widths)
        ]
        return cls(matrix_size, tuple(blocks))

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
        return tuple(cell for block in self.blocks for cell in block.cells(self.matrix_size))

    def to_matrix(self, cells):
        """(..., m²) in cell order to (..., m, m); for tensors and arrays alike."""
        inverse = np.argsort(self.matrix_index)
        return cells[..., inverse].reshape(*cells.shape[:-1], self.matrix_size, self.matrix_size)

    def to_cells(self, matrix):
        """(..., m, m) to (..., m²) in cell order; the inverse of `to_matrix`."""
        flat = matrix.reshape(*matrix.shape[:-2], self.matrix_size**2)
        return flat[..., list(self.matrix_index)]
