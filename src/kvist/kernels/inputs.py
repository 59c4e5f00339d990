# mypy: ignore-errors
# ruff: noqa: N803
"""What a decode step needs, from one upload: ids, positions, lengths, tables and places.

A kernel of its own, so that a whole step from the host's numbers to the sampled tokens is one
recording. Called by the runner's graphs. Imports Triton.
"""

import triton.language as tl

from kvist.kernels.jit import kernel


@kernel()
def place_kernel(
    upload_ptr,
    last_ptr,
    all_tables_ptr,
    ids_ptr,
    positions_ptr,
    lens_ptr,
    table_ptr,
    places_ptr,
    stride,
    max_blocks,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row: its token, where it stands, and where its keys lie and go."""
    row = tl.program_id(0)
    token = tl.load(upload_ptr + row)
    position = tl.load(upload_ptr + stride + row)
    slot = tl.load(upload_ptr + 2 * stride + row)
    token = tl.where(token < 0, tl.load(last_ptr + slot), token)
    here = tl.maximum(position, 0)
    tl.store(ids_ptr + row, token)
    tl.store(positions_ptr + row, here)
    tl.store(lens_ptr + row, (position + 1).to(tl.int32))
    source = all_tables_ptr + slot * max_blocks
    target = table_ptr + row.to(tl.int64) * max_blocks
    last_block = here // BLOCK_SIZE
    i = tl.arange(0, TILE)
    for start in range(0, last_block.to(tl.int32) + 1, TILE):
        ok = start + i <= last_block
        tl.store(target + start + i, tl.load(source + start + i, mask=ok, other=0), mask=ok)
    block = tl.load(source + last_block).to(tl.int64)
    tl.store(places_ptr + row, block * BLOCK_SIZE + here % BLOCK_SIZE)


def place(upload, last, all_tables, ids, positions, lens, table, places, block_size: int) -> None:
    """Fill what one group of layers reads in a step of one new token for each row.

    Args:
        upload: `[at least 3, capacity]` int64: token (-1: the last of its slot), position (-1: a
            row that only pads), slot.
        last: `[slots]` int64, the token last sampled in each.
        all_tables: `[slots, max_blocks]` int32, every slot's block table.
        ids: `[R]` int64, written.
        positions: `[R]` int64, written.
        lens: `[R]` int32, written: keys that each row sees; 0 for rows that pad.
        table: `[R, max_blocks]` int32, written as far as each row reaches.
        places: `[R]` int64, written: where in the pool each row's keys go.
        block_size: token places of a block.
    """
    place_kernel[(ids.shape[0],)](
        upload,
        last,
        all_tables,
        ids,
        positions,
        lens,
        table,
        places,
        upload.stride(0),
        all_tables.stride(0),
        BLOCK_SIZE=block_size,
        TILE=128,
        num_warps=1,
    )
