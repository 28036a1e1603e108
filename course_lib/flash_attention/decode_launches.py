"""How the decode kernel is launched: tiles, splits, and the list of launches for the compile gate.

Decoding is bound by reading the cache, so a tile of keys is as large as lets two programs share a
multiprocessor (half of its shared memory, no spilled register): while one computes, the other
waits for memory. Entries that a benchmark on the GPU found to be faster come first where there is
a recorded run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from .launches import BLOCK_DS, LaunchConfig, block_d, table_architecture

if TYPE_CHECKING:
    from course_lib.runtime.crosscompile import Launch

# ruff: noqa: E501  (the table is wide)

__all__ = ["choose_splits", "decode_config", "launches"]

#: Rows (query heads of a group times queries) up to which the small tile of rows is used.
FEW_ROWS = 16
#: Programs that a multiprocessor holds at once, and that the splits should provide.
PROGRAMS_A_MULTIPROCESSOR = 2
#: Keys that are worth a program of their own.
KEYS_A_SPLIT = 256
MOST_SPLITS = 128

# (few or many rows) → (architecture, bytes an element) → for each of BLOCK_DS (BLOCK_M, BLOCK_N,
# num_warps, num_stages). sm_89 and sm_120 use the rows of sm_86, as in launches.py.
# fmt: off
TABLE: dict[str, dict[tuple[int, int], list[tuple[int, int, int, int] | None]]] = {
    "decode": {
        (75, 2): [(16, 32, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1), None],
        (75, 4): [(16, 64, 4, 1), (16, 32, 4, 1), (16, 32, 8, 1), (16, 32, 8, 1), None],
        (80, 2): [(16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)],
        (80, 4): [(16, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 2), (16, 16, 8, 2)],
        (86, 2): [(16, 64, 4, 3), (16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2), (16, 32, 4, 2)],
        (86, 4): [(16, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 2), (16, 32, 8, 2), (16, 16, 8, 2)],
        (90, 2): [(16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)],
        (90, 4): [(16, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 2), (16, 32, 8, 2)],
        (100, 2): [(16, 64, 4, 3), (16, 128, 4, 3), (16, 128, 4, 3), (16, 64, 4, 3), (16, 64, 4, 2)],
        (100, 4): [(16, 64, 8, 2), (16, 64, 8, 2), (16, 64, 8, 2), (16, 32, 8, 2), (16, 32, 8, 2)],
    },
    "decode_rows": {
        (75, 2): [(64, 32, 8, 1), (64, 32, 8, 1), (32, 32, 8, 1), (16, 32, 8, 1), None],
        (75, 4): [(64, 32, 8, 1), (64, 32, 8, 1), (64, 16, 8, 1), (32, 16, 8, 1), None],
        (80, 2): [(64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 8, 2)],
        (80, 4): [(64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 2), (16, 16, 8, 2)],
        (86, 2): [(64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 2), (32, 32, 8, 2)],
        (86, 4): [(64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 2)],
        (90, 2): [(64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)],
        (90, 4): [(64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 2), (16, 16, 8, 2)],
        (100, 2): [(64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 8, 2)],
        (100, 4): [(64, 32, 8, 2), (64, 32, 8, 2), (64, 16, 8, 1), (32, 16, 8, 1), (16, 16, 8, 2)],
    },
}
# fmt: on

# On CPU, under the interpreter: small and unequal enough that a short cache has several splits.
INTERPRETED = {
    "decode": LaunchConfig(16, 32, 4, 1),
    "decode_rows": LaunchConfig(64, 32, 4, 1),
}
INTERPRETED_MULTIPROCESSORS = 4


def decode_config(arch: int | None, rows: int, head_dim: int, itemsize: int) -> LaunchConfig:
    """Look up the configuration.

    Args:
        arch: What ``table_architecture`` gave; None under the interpreter.
        rows: Query heads a kv head, times queries.
        head_dim: D, in elements.
        itemsize: Bytes an element: 2 or 4.

    Raises:
        ValueError: The table has no such row (sm_75 above D = 128).
    """
    kernel = "decode" if rows <= FEW_ROWS else "decode_rows"
    if arch is None:
        return INTERPRETED[kernel]
    row = TABLE[kernel][arch, itemsize][BLOCK_DS.index(block_d(head_dim))]
    if row is None:
        raise ValueError(f"no {kernel} configuration for sm_{arch} and head dimension {head_dim}")
    return LaunchConfig(*row)


def choose_splits(programs: int, keys: int, multiprocessors: int) -> int:
    """How many parts the keys are cut into, so that all of the GPU reads.

    As many as let every program run at once, two on each multiprocessor: a program more would
    wait for the first to end, and the GPU with it. But no more than one for every 256 keys, since
    a split ends by writing its partial output, and no more than 128.

    Args:
        programs: B * Hkv * blocks of rows: what there is without splitting.
        keys: The most that a sequence can have to read: Tmax, or what its window spans.
        multiprocessors: Of the GPU.
    """
    fitting = PROGRAMS_A_MULTIPROCESSOR * multiprocessors // max(programs, 1)
    return max(min(fitting, keys // KEYS_A_SPLIT, MOST_SPLITS), 1)


# ---- the list for the compile gate ---------------------------------------------------------


def decode_launch(
    kernel: str,
    arch: int,
    head_dim: int,
    dtype: str,
    *,
    split: bool,
    config: LaunchConfig | None = None,
) -> Launch:
    """One launch, for the compile gate; ``config`` stands in for the table's when one is tuned.

    Args:
        kernel: "decode" or "decode_rows".
        arch: Compute capability, 90 for sm_90.
        head_dim: D.
        dtype: Of q and the caches.
        split: Whether partial outputs are written, in fp32, with lengths given; else the whole
            output, in ``dtype``, with every cache full.
        config: Tile sizes, warps and stages.
    """
    from course_lib.runtime.crosscompile import Launch

    from .decode_kernels import flash_attention_decode_kernel as function

    rows = FEW_ROWS if kernel == "decode" else FEW_ROWS + 1
    if config is None:
        table_row = table_architecture(divmod(arch, 10))
        config = decode_config(table_row, rows, head_dim, 4 if dtype == "fp32" else 2)
    constexprs: dict[str, int | None] = {
        "ALIGN": 16,
        "D": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
    }
    types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "o_ptr"), f"*{dtype}")
    types |= {"lse_ptr": "*fp32", "scale_log2": "fp32"}
    if split:
        types |= {"seqlens_ptr": "*i32", "o_ptr": "*fp32"}
    else:
        constexprs["seqlens_ptr"] = None
    kind = "split" if split else "whole"
    return Launch(
        name=f"{kernel}/sm_{arch}/d{head_dim}/{dtype}/{kind}",
        kernel=function,
        signature={
            name: types.get(name, "i32") for name in function.arg_names if name not in constexprs
        },
        constexprs=constexprs,
        arch=arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
    )


def launches() -> Iterator[Launch]:
    """Every configuration on its architectures, with and without splits."""
    for kernel, rows in TABLE.items():
        for (arch, itemsize), row in rows.items():
            dtype = "fp32" if itemsize == 4 else "fp16" if arch == 75 else "bf16"
            for head_dim, config in zip(BLOCK_DS, row, strict=True):
                if config is None:
                    continue
                for split in (False, True):
                    yield decode_launch(kernel, arch, head_dim, dtype, split=split)
                    if arch == 86:
                        yield decode_launch(kernel, 89, head_dim, dtype, split=split)
    # What the rows above do not show: padded head dimensions, and the other half dtype.
    for arch in (80, 89, 90, 100):
        for kernel in TABLE:
            yield decode_launch(kernel, arch, 72, "bf16", split=True)
            yield decode_launch(kernel, arch, 80, "bf16", split=False)
            yield decode_launch(kernel, arch, 128, "fp16", split=True)
