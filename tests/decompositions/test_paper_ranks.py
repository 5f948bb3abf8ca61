"""The proportional rule against Tables 2 and 3 of the paper (appendix A.1)."""

import pytest
from torch import nn

from tdkit.decompositions.base import as_tuple, count
from tdkit.decompositions.cp import Cp
from tdkit.decompositions.tt import TensorTrain
from tdkit.decompositions.tucker import Tucker
from tdkit.layers.spec import LayerSpec, spec_of

KEEPS = (0.1, 0.25, 0.5, 0.75, 0.9)

# (in, out, kernel): CP, Tucker (out, in), TT (inner ranks) at the five keeps. GaripovNet's layers
# 2, 4, 6, 8, 10 and ResNet-18's 15, 19, 28, 38, 44, 60, 63 are of these shapes.
TABLES = {
    (64, 64, 3): (
        (28, 69, 138, 206, 248),
        ((14, 14), (26, 26), (39, 39), (49, 49), (54, 54)),
        ((40, 4, 12), (64, 11, 33), (64, 27, 64), (64, 51, 64), (64, 65, 64)),
    ),
    (64, 128, 3): (
        (37, 93, 186, 279, 335),
        ((26, 13), (49, 24), (74, 37), (94, 47), (105, 52)),
        ((63, 6, 18), (64, 19, 57), (64, 36, 108), (64, 60, 128), (64, 80, 128)),
    ),
    (128, 128, 3): (
        (56, 141, 281, 422, 507),
        ((29, 29), (51, 51), (77, 77), (98, 98), (108, 108)),
        ((94, 4, 12), (128, 21, 63), (128, 53, 128), (128, 101, 128), (128, 130, 128)),
    ),
    (256, 256, 3): (
        (114, 285, 569, 854, 1025),
        ((57, 57), (103, 103), (155, 155), (195, 195), (216, 216)),
        ((207, 5, 15), (256, 43, 129), (256, 107, 256), (256, 203, 256), (256, 262, 256)),
    ),
    (128, 256, 1): (
        (8, 21, 42, 64, 76),
        ((10, 5), (25, 12), (48, 24), (69, 35), (82, 41)),
        None,  # printed for layer 41, but (256, 11, 33) does not fit a 1x1 kernel: a misprint
    ),
    (512, 512, 3): (
        (229, 573, 1145, 1718, 2062),
        ((115, 115), (205, 205), (310, 310), (390, 390), (432, 432)),
        ((425, 5, 15), (512, 85, 255), (512, 213, 512), (512, 401, 512), (512, 526, 512)),
    ),
}

# Where the authors' own search for a fraction stopped a little off the nearest count. Listed
# ranks, as the shipped studies use, reproduce these too.
OFF_TARGET = {((256, 256, 3), 0.9), ((512, 512, 3), 0.75), ((512, 512, 3), 0.9)}

CASES = [(shape, i, keep) for shape in TABLES for i, keep in enumerate(KEEPS)]


def layer(shape: tuple[int, int, int]) -> LayerSpec:
    return spec_of(nn.Conv2d(*shape, bias=False))


@pytest.mark.parametrize(("shape", "i", "keep"), CASES)
def test_cp_ranks(shape: tuple[int, int, int], i: int, keep: float) -> None:
    assert Cp().rank(layer(shape), keep) == TABLES[shape][0][i]


@pytest.mark.parametrize(("shape", "i", "keep"), CASES)
def test_tucker_ranks(shape: tuple[int, int, int], i: int, keep: float) -> None:
    assert Tucker().rank(layer(shape), keep) == TABLES[shape][1][i]


@pytest.mark.parametrize(("shape", "i", "keep"), [c for c in CASES if TABLES[c[0]][2]])
def test_tt_ranks(shape: tuple[int, int, int], i: int, keep: float) -> None:
    printed = TABLES[shape][2][i]
    got = TensorTrain().rank(layer(shape), keep)
    if (shape, keep) not in OFF_TARGET:
        assert got == printed
        return
    wanted = keep * layer(shape).weight_parameters
    sizes = [count(TensorTrain().stages(layer(shape), rank)) for rank in (got, printed)]
    assert abs(sizes[0] - wanted) < abs(sizes[1] - wanted)
    assert sizes[1] == pytest.approx(sizes[0], rel=0.01)


@pytest.mark.parametrize("shape", [shape for shape in TABLES if TABLES[shape][2]])
def test_the_printed_ranks_can_be_used_as_they_are(shape: tuple[int, int, int]) -> None:
    for ranks, method in zip(TABLES[shape], (Cp(), Tucker(), TensorTrain()), strict=True):
        for rank, keep in zip(ranks, KEEPS, strict=True):
            largest = as_tuple(method.max_rank(layer(shape)))
            assert all(r <= top for r, top in zip(as_tuple(rank), largest, strict=True))
            share = count(method.stages(layer(shape), rank)) / layer(shape).weight_parameters
            assert share == pytest.approx(keep, abs=0.012)
