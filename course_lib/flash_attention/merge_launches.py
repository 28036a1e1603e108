"""How the merge kernels are launched, and the list of these launches for the compile gate.

The kernels read and add up, without a matrix product, so one rule serves every architecture: a
tile of 2048 elements, as many parts of it as there are, the rest of it rows. A tile that holds all
parts of a row asks for them all at once, which is what a merge of few rows waits for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

from .launches import BLOCK_DS, block_d

if TYPE_CHECKING:
    from course_lib.runtime.crosscompile import Launch

__all__ = ["MergeConfig", "launches", "merge_config"]

#: Parts in a tile; more are taken in turn. Few sizes, since each is compiled on its own.
BLOCKS_OF_PARTS = (2, 8, 32)
TILE_ELEMENTS = 2048


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Tile sizes in rows and parts, and warps a program."""

    BLOCK_M: int
    BLOCK_S: int
    num_warps: int


def merge_config(parts: int, head_dim: int) -> MergeConfig:
    """Look up the configuration for so many parts of so many elements."""
    BLOCK_S = next((size for size in BLOCKS_OF_PARTS if parts <= size), BLOCKS_OF_PARTS[-1])
    BLOCK_M = max(TILE_ELEMENTS // (BLOCK_S * block_d(head_dim)), 1)
    return MergeConfig(BLOCK_M, BLOCK_S, num_warps=4)


# ---- the list for the compile gate ---------------------------------------------------------


def merge_launch(
    kernel: str, arch: int, head_dim: int, dtypes: tuple[str, str], parts: int
) -> Launch:
    """One launch.

    Args:
        kernel: "merge_fwd" or "merge_bwd".
        arch: Compute capability, 90 for sm_90.
        head_dim: D.
        dtypes: Of the parts, and of the merged output.
        parts: S.
    """
    from course_lib.runtime.crosscompile import Launch

    from . import merge_kernels

    suffix = kernel.removeprefix("merge_")
    function = getattr(merge_kernels, f"merge_attention_states_{suffix}_kernel")
    config = merge_config(parts, head_dim)
    constexprs = {
        "ONE_BLOCK": parts <= config.BLOCK_S,
        "ALIGN": 16,
        "D": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_S": config.BLOCK_S,
    }
    types = dict.fromkeys(("lses_ptr", "lse_ptr", "dlse_ptr", "dlses_ptr"), "*fp32")
    types |= dict.fromkeys(("outs_ptr", "dout_ptr", "douts_ptr"), f"*{dtypes[0]}")
    types |= {"out_ptr": f"*{dtypes[1]}"}
    types |= dict.fromkeys(("stride_outs_s", "stride_outs_n", "S", "N"), "i32")
    dtype = dtypes[0] if dtypes[0] == dtypes[1] else f"{dtypes[0]}_to_{dtypes[1]}"
    return Launch(
        name=f"{kernel}/sm_{arch}/d{head_dim}/{dtype}/{parts}_parts",
        kernel=function,
        signature={name: types[name] for name in function.arg_names if name in types},
        constexprs={n: v for n, v in constexprs.items() if n in function.arg_names},
        arch=arch,
        num_warps=config.num_warps,
        num_stages=1,
    )


def launches() -> Iterator[Launch]:
    """Every configuration, and what decoding merges: parts in fp32, the result in half."""
    from course_lib.runtime.crosscompile import ARCHITECTURES

    many = BLOCKS_OF_PARTS[-1] + 1
    for arch in ARCHITECTURES:
        half = "fp16" if arch == 75 else "bf16"
        for head_dim in BLOCK_DS[: 4 if arch == 75 else 5]:
            for parts in BLOCKS_OF_PARTS:
                for dtypes in ((half, half), ("fp32", "fp32")):
                    yield merge_launch("merge_fwd", arch, head_dim, dtypes, parts)
                    yield merge_launch("merge_bwd", arch, head_dim, dtypes, parts)
                yield merge_launch("merge_fwd", arch, head_dim, ("fp32", half), parts)
            for dtypes in ((half, half), ("fp32", "fp32")):
                yield merge_launch("merge_bwd", arch, head_dim, dtypes, many)
    for head_dim in (72, 80):
        yield merge_launch("merge_fwd", 90, head_dim, ("bf16", "bf16"), 8)
        yield merge_launch("merge_bwd", 90, head_dim, ("bf16", "bf16"), 8)
        yield merge_launch("merge_fwd", 90, head_dim, ("fp32", "fp16"), 8)
