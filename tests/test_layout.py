import numpy as np
import pytest

from musota.models.layout import BlockLayout
from musota.registry import find_experiment

PLANS = BlockLayout.standard(8, 16), BlockLayout.standard(6, 8), BlockLayout.standard(8, 8)
REDESIGNED = find_experiment("redesigned").model.layout


@pytest.mark.parametrize("layout", [*PLANS, REDESIGNED])
def test_the_channels_of_a_block_fill_its_rectangle_and_all_blocks_tile_the_matrix(layout):
    places = layout.to_matrix(np.stack([np.arange(layout.height * layout.width)] * 2))[1]
    assert sorted(places.flatten()) == list(range(layout.height * layout.width))
    first = 0
    for b in layout.blocks:
        rectangle = places[b.row : b.row + b.height, b.column : b.column + b.width]
        assert rectangle.flatten().tolist() == list(range(first, first + b.size))
        first += b.size


def test_the_named_layouts():
    big, small, eight = PLANS
    assert " ".join(big.names) == "I S C1 C2 R1 R2 T K G M D F P E A X"
    assert set(big.sizes) == {4} and big.groups == ((16, 4),)
    assert [(b.row, b.column) for b in big.blocks[:5]] == [(0, 0), (0, 2), (0, 4), (0, 6), (2, 0)]
    assert " ".join(small.names) == " ".join(REDESIGNED.names) == "I S C1 R1 R2 T K G"
    assert small.sizes == (4, 4, 4, 4, 4, 4, 6, 6) and small.groups == ((6, 4), (2, 6))
    assert [(b.height, b.width) for b in eight.blocks] == [(2, 4)] * 8
    assert (REDESIGNED.height, REDESIGNED.width) == (16, 13) and set(REDESIGNED.sizes) == {26}
    assert find_experiment("modern_twin").model.layout is None
