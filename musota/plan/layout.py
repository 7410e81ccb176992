"""BlockLayout: which cells of a token's matrix belong to which semantic block, and in what order.

A model computes on a vector of d = m² cells stored block by block ("cell order"). Only pictures
speak of rows and columns ("matrix order"). `to_matrix` and `to_cells` are the one bridge.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import groupby

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


EIGHT_BLOCKS = ("I", "S", "C1", "R1", "R2", "T", "K", "G")


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
    """Blocks that tile an m×m matrix. Raises ValueError if they overlap, leave a gap, stick out."""

    matrix_size: int
    blocks: tuple[Block, ...]

    def __post_init__(self):
        owner: dict[int, str] = {}
        for block in self.blocks:
            if (
                min(block.row, block.column) < 0
                or min(block.height, block.width) < 1
                or block.row + block.height > self.matrix_size
                or block.column + block.width > self.matrix_size
            ):
                raise ValueError(
                    f"Block {block.name} lies outside the {self.matrix_size}×{self.matrix_size} "
                    "matrix: choose rectangles inside it."
                )
            for cell in self._cells_of(block):
                if cell in owner:
                    raise ValueError(
                        f"Blocks {owner[cell]} and {block.name} overlap in row "
                        f"{cell // self.matrix_size}, column {cell % self.matrix_size}."
                    )
                owner[cell] = block.name
        missing = sorted(set(range(self.matrix_size**2)) - set(owner))
        if missing:
            raise ValueError(
                f"{len(missing)} cells belong to no block, the first in row "
                f"{missing[0] // self.matrix_size}, column {missing[0] % self.matrix_size}: the "
                "blocks must tile the matrix."
            )

    @classmethod
    @lru_cache
    def standard(cls, matrix_size: int, n_block: int) -> BlockLayout:
        """The layout of `n_block` blocks: equal rectangles in a grid, or the plan's 6×6 with 8.

        Raises ValueError where no grid of equal rectangles exists.
        """
        if (matrix_size, n_block) == (6, 8):  # 36 cells do not split into 8: three uneven bands
            bands = [(0, [2, 2, 2]), (2, [2, 2, 2]), (4, [3, 3])]
        else:
            # The most nearly square grid; the wider blocks where two are equally square.
            grids = [
                (rows, n_block // rows)
                for rows in range(n_block, 0, -1)
                if n_block % rows == 0
                and matrix_size % rows == 0
                and matrix_size % (n_block // rows) == 0
            ]
            if not grids:
                raise ValueError(
                    f"{n_block} equal blocks do not tile a {matrix_size}×{matrix_size} matrix: use "
                    "8×8 with 16 or 8 blocks, or 6×6 with 8."
                )
            rows, columns = min(grids, key=lambda grid: abs(grid[0] - grid[1]))
            height, width = matrix_size // rows, matrix_size // columns
            bands = [(row * height, [width] * columns) for row in range(rows)]
        names = list(SEMANTIC_NAMES) if n_block == 16 else list(EIGHT_BLOCKS)
        if n_block not in (8, 16):
            names = [f"B{index + 1}" for index in range(n_block)]
        tops = [top for top, _ in bands] + [matrix_size]
        blocks = []
        for (top, widths), bottom in zip(bands, tops[1:], strict=True):
            column = 0
            for width in widths:
                blocks.append(Block(names[len(blocks)], top, column, bottom - top, width))
                column += width
        return cls(matrix_size, tuple(blocks))

    def _cells_of(self, block: Block) -> list[int]:
        """Row-major matrix indices of a block's cells, row by row."""
        return [
            row * self.matrix_size + column
            for row in range(block.row, block.row + block.height)
            for column in range(block.column, block.column + block.width)
        ]

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
        return tuple(cell for block in self.blocks for cell in self._cells_of(block))

    def to_matrix(self, cells):
        """(..., m²) in cell order to (..., m, m); for tensors and arrays alike."""
        inverse = [0] * len(self.matrix_index)
        for position, cell in enumerate(self.matrix_index):
            inverse[cell] = position
        return cells[..., inverse].reshape(*cells.shape[:-1], self.matrix_size, self.matrix_size)

    def to_cells(self, matrix):
        """(..., m, m) to (..., m²) in cell order; the inverse of `to_matrix`."""
        flat = matrix.reshape(*matrix.shape[:-2], self.matrix_size**2)
        return flat[..., list(self.matrix_index)]
