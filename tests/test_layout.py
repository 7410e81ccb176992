import numpy as np
import pytest

from musota.plan.layout import BlockLayout


@pytest.mark.parametrize(("size", "n"), [(8, 16), (6, 8), (8, 8)])
def test_each_blocks_cells_fill_its_rectangle_and_all_tile_the_matrix(size, n):
    layout = BlockLayout.standard(size, n)
    owner = np.repeat(np.arange(n), layout.sizes)  # block of each cell, in cell order
    matrix = layout.to_matrix(np.stack([owner, owner]))[1]
    for index, block in enumerate(layout.blocks):
        rows, columns = np.nonzero(matrix == index)
        assert (rows.min(), rows.max() + 1) == (block.row, block.row + block.height)
        assert (columns.min(), columns.max() + 1) == (block.column, block.column + block.width)
        assert len(rows) == block.size
    places = layout.to_matrix(np.arange(size * size))
    assert sorted(places.flatten()) == list(range(size * size))
    first = layout.blocks[0]  # row by row
    assert (places[: first.height, : first.width].flatten() == np.arange(first.size)).all()


def test_the_named_layouts():
    big, small = BlockLayout.standard(8, 16), BlockLayout.standard(6, 8)
    assert " ".join(big.names) == "I S C1 C2 R1 R2 T K G M D F P E A X"
    assert set(big.sizes) == {4} and big.groups == ((16, 4),)
    assert [(b.row, b.column) for b in big.blocks[:5]] == [(0, 0), (0, 2), (0, 4), (0, 6), (2, 0)]
    assert " ".join(small.names) == "I S C1 R1 R2 T K G"
    assert small.sizes == (4, 4, 4, 4, 4, 4, 6, 6) and small.groups == ((6, 4), (2, 6))
    assert [(b.height, b.width) for b in BlockLayout.standard(8, 8).blocks] == [(2, 4)] * 8
