import numpy as np
import pytest
import torch

from musota.plan.layout import Block, BlockLayout

LAYOUTS = [(8, 16), (6, 8), (8, 8)]


@pytest.mark.parametrize(("size", "n"), LAYOUTS)
def test_cells_to_matrix_and_back(size, n):
    layout = BlockLayout.standard(size, n)
    cells = torch.randn(3, 5, size * size)
    assert torch.equal(layout.to_cells(layout.to_matrix(cells)), cells)
    matrix = torch.randn(2, size, size)
    assert torch.equal(layout.to_matrix(layout.to_cells(matrix)), matrix)


@pytest.mark.parametrize(("size", "n"), LAYOUTS)
def test_each_blocks_cells_fill_its_rectangle(size, n):
    layout = BlockLayout.standard(size, n)
    owner = np.repeat(np.arange(n), layout.sizes)  # block of each cell, in cell order
    matrix = layout.to_matrix(owner)
    for index, block in enumerate(layout.blocks):
        rows, columns = np.nonzero(matrix == index)
        assert (rows.min(), rows.max() + 1) == (block.row, block.row + block.height)
        assert (columns.min(), columns.max() + 1) == (block.column, block.column + block.width)
        assert len(rows) == block.size


def test_the_named_layouts():
    big = BlockLayout.standard(8, 16)
    assert big.names == (
        "I",
        "S",
        "C1",
        "C2",
        "R1",
        "R2",
        "T",
        "K",
        "G",
        "M",
        "D",
        "F",
        "P",
        "E",
        "A",
        "X",
    )
    assert set(big.sizes) == {4} and big.groups == ((16, 4),)
    assert [(b.row, b.column) for b in big.blocks[:5]] == [(0, 0), (0, 2), (0, 4), (0, 6), (2, 0)]
    small = BlockLayout.standard(6, 8)
    assert small.names == ("I", "S", "C1", "R1", "R2", "T", "K", "G")
    assert small.sizes == (4, 4, 4, 4, 4, 4, 6, 6) and small.groups == ((6, 4), (2, 6))
    assert [(b.height, b.width) for b in BlockLayout.standard(8, 8).blocks] == [(2, 4)] * 8


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ([Block("a", 0, 0, 2, 1)], "overlap or leave a gap"),
        ([Block("a", 0, 0, 2, 2), Block("b", 1, 1, 1, 1)], "overlap or leave a gap"),
        ([Block("a", 0, 0, 3, 2)], "Block a lies outside the 2×2"),
    ],
)
def test_a_layout_must_tile_the_matrix(blocks, message):
    with pytest.raises(ValueError, match=message):
        BlockLayout(2, 2, tuple(blocks))
