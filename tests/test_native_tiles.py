"""Which tile the GEMM of the native library takes: a pure function of sizes and SMs (csrc/gemm/tiles.h)."""

import math

import pytest

from peft_kernels import _native

pytestmark = pytest.mark.skipif(not _native.build_facts(), reason="needs the build's facts, for this Python")

SMS = 132  # an H100's and an H200's
ROWS = (2048, 4096, 8192, 16384, 32768)
COLUMNS = (1024, 1536, 2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192, 9216, 10240, 11008, 12288, 13312, 13824)
COLUMNS += (14336,)
WIDE, SQUARE = (128, 256, "sm_90a"), (128, 128, "sm_90a")

#: Of the shapes above, those that keep the square tile, and why.
KEPT = {(2048, 1024): "64 tiles of 128 × 256 leave half of 132 SMs idle, 128 of 128 × 128 nearly none"}


def cycles(tile, across, down):
    """Of a stage of 64 in depth on an SM: tensor cores, L2 cache and shared memory, of which the slowest counts."""
    rows, columns, _ = tile
    tensor = rows * columns * 64 / 2048
    of_l2 = (rows / across + columns / down) * 64 * 2 / 46.6  # what a cluster shares comes once
    written, read = (rows + columns) * 64 * 2, (rows + rows // 64 * columns) * 64 * 2
    return max(tensor, of_l2, (written + read) / 128)


def test_the_tile_of_90_large_shapes():
    shapes = [(rows, columns) for rows in ROWS for columns in COLUMNS]
    assert len(shapes) == 90
    taken = {shape: _native.gemm_tile(*shape, SMS, True) for shape in shapes}
    assert set(taken.values()) == {WIDE, SQUARE}
    assert {shape for shape, tile in taken.items() if tile == SQUARE} == set(KEPT)


def test_the_square_tile_is_taken_where_it_is_faster_by_the_price():
    """By more than a sixteenth, which no unmeasured price decides."""

    def time(shape, tile, down, across):
        clusters = math.ceil(shape[0] / (down * tile[0])) * math.ceil(shape[1] / (across * tile[1]))
        return math.ceil(clusters / (SMS // 2)) * cycles(tile, across, down)

    assert (cycles(WIDE, 1, 2), cycles(SQUARE, 2, 1)) == (1024, 640)
    for rows in ROWS:
        for columns in COLUMNS:
            wide, square = time((rows, columns), WIDE, 2, 1), time((rows, columns), SQUARE, 1, 2)
            assert (16 * square < 15 * wide) == ((rows, columns) in KEPT), (rows, columns)


@pytest.mark.parametrize("columns", [1024, 4096, 14336])
def test_few_rows_take_no_tile_of_empty_rows(columns):
    """A cluster whose tiles lie one above another would be half empty."""
    for rows in (1, 16, 64, 65, 128):
        assert _native.gemm_tile(rows, columns, SMS, True)[:2] in ((64, 64), SQUARE[:2])


def test_without_tiles_for_sm_90a():
    for rows in (1, 2048, 32768):
        assert _native.gemm_tile(rows, 4096, SMS, False)[2] == "sm_80"
