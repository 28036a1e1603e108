"""How the kernels are launched: tile sizes, warps and pipeline depth, and the list of it all.

The table is data, not a search: a learner waits for no tuning run, and every entry can be
compiled, and its registers and spills read, on a machine without a GPU. ``LAUNCHES`` is that
list; the gate in ``tests/flash_attention/test_compile_gate.py`` compiles it.

How an entry is chosen: the largest tiles that the architecture holds without spilling a register,
causal and not. Sizes that a benchmark on the GPU found to be faster come first where there is a
recorded run.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from course_lib.runtime.crosscompile import Launch

# ruff: noqa: E501, F822  (the table is wide; LAUNCHES is made by __getattr__)

__all__ = [
    "BLOCK_DS",
    "COMPILED_TABLE",
    "HEAD_DIMS",
    "LAUNCHES",  # pyright: ignore[reportUnsupportedDunderAll]
    "TABLE",
    "LaunchConfig",
    "block_d",
    "launch_config",
    "table_architecture",
]

#: Registers, spills and shared memory of every launch, as last compiled.
COMPILED_TABLE = Path(__file__).with_name("compiled.json")

#: Head dimensions that the kernels take: any number in this range, padded to a power of two.
HEAD_DIMS = range(16, 257)


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Tile sizes in queries and keys, warps a program, and depth of the software pipeline."""

    BLOCK_M: int
    BLOCK_N: int
    num_warps: int
    num_stages: int


BLOCK_DS = (16, 32, 64, 128, 256)

# kernel → (architecture, bytes an element) → for each of BLOCK_DS (BLOCK_M, BLOCK_N, num_warps,
# num_stages). On sm_75, where Triton multiplies without tensor cores, 256 would spill kilobytes.
# sm_89 and sm_120 have the registers and the shared memory of sm_86, and use its rows.
# fmt: off
TABLE: dict[str, dict[tuple[int, int], list[tuple[int, int, int, int] | None]]] = {
    "fwd": {
        (75, 2): [(64, 32, 4, 1), (64, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), None],
        (75, 4): [(64, 32, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (32, 32, 8, 2), None],
        (80, 2): [(128, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 64, 8, 2)],
        (80, 4): [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 2), (32, 16, 8, 1)],
        (86, 2): [(128, 128, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 3), (64, 32, 8, 2)],
        (86, 4): [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (16, 32, 8, 1), (16, 16, 8, 1)],
        (90, 2): [(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (128, 32, 8, 2)],
        (90, 4): [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 1)],
        (100, 2): [(128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 2), (128, 32, 8, 2)],
        (100, 4): [(64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (32, 16, 8, 2), (16, 16, 8, 1)],
    },
    "bwd_dkdv": {
        (75, 2): [(32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1), None],
        (75, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), None],
        (80, 2): [(64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 2), (32, 64, 8, 2)],
        (80, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)],
        (86, 2): [(64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 2), (32, 32, 8, 1)],
        (86, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
        (90, 2): [(64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 128, 8, 2), (32, 32, 8, 1)],
        (90, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)],
        (100, 2): [(64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2)],
        (100, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)],
    },
    "bwd_dkdv_grouped": {
        (75, 2): [(32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 4, 1), (16, 16, 8, 1), None],
        (75, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), None],
        (80, 2): [(64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 3), (64, 64, 8, 1), (32, 32, 8, 1)],
        (80, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)],
        (86, 2): [(64, 128, 8, 3), (64, 128, 8, 3), (64, 128, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)],
        (86, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 16, 8, 1)],
        (90, 2): [(64, 128, 8, 2), (64, 128, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2), (32, 32, 8, 1)],
        (90, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)],
        (100, 2): [(64, 64, 4, 2), (64, 128, 8, 2), (64, 64, 8, 2), (64, 64, 8, 1), (32, 32, 8, 1)],
        (100, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1), (16, 32, 8, 1)],
    },
    "bwd_dq": {
        (75, 2): [(32, 32, 4, 1), (32, 32, 4, 1), (32, 32, 8, 1), (16, 16, 8, 1), None],
        (75, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1), None],
        (80, 2): [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (64, 64, 8, 1)],
        (80, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 32, 8, 2), (16, 16, 8, 2)],
        (86, 2): [(128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 8, 3), (128, 32, 8, 2), (64, 32, 8, 1)],
        (86, 4): [(32, 64, 4, 2), (32, 32, 4, 1), (32, 32, 8, 1), (16, 32, 8, 2), (16, 16, 8, 2)],
        (90, 2): [(128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 3), (128, 64, 8, 2), (64, 32, 8, 2)],
        (90, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2)],
        (100, 2): [(128, 64, 8, 3), (128, 64, 8, 3), (64, 64, 4, 2), (128, 64, 8, 2), (64, 64, 8, 1)],
        (100, 4): [(32, 64, 4, 2), (32, 64, 8, 2), (32, 32, 8, 1), (16, 16, 8, 1), (16, 16, 8, 2)],
    },
}
# fmt: on

# Windows and packed batches take a few registers more. Where an entry of the table has none left
# for them, they have one of their own: (kernel, architecture, bytes an element, BLOCK_D).
WINDOWED_OR_PACKED: dict[tuple[str, int, int, int], tuple[int, int, int, int]] = {
    ("fwd", 86, 2, 128): (64, 64, 8, 2),
    ("fwd", 100, 2, 64): (128, 64, 8, 3),
    ("fwd", 100, 2, 128): (128, 64, 8, 3),
    ("bwd_dkdv_grouped", 80, 2, 64): (32, 128, 8, 2),
    ("bwd_dkdv_grouped", 86, 2, 64): (32, 128, 8, 2),
    ("bwd_dkdv_grouped", 90, 2, 64): (32, 128, 8, 2),
    ("bwd_dkdv_grouped", 90, 2, 128): (32, 64, 8, 1),
}

# Bytes a thread that may spill after all, by (kernel, architecture, bytes an element, BLOCK_D).
ADMITTED_SPILLS = {
    # A scalar or two that wait outside the loops.
    ("fwd", 90, 2, 256): 16,
    ("fwd", 90, 4, 32): 16,
    ("fwd", 100, 4, 256): 16,
    ("bwd_dq", 75, 2, 128): 16,
    ("bwd_dq", 86, 4, 16): 16,
    ("bwd_dkdv", 80, 2, 128): 16,
    ("bwd_dkdv", 80, 2, 256): 16,
    ("bwd_dq", 75, 4, 128): 16,
    ("bwd_dq", 90, 4, 32): 16,
    ("bwd_dq", 100, 4, 256): 16,
    ("bwd_dkdv_grouped", 80, 4, 32): 16,
    ("bwd_dkdv_grouped", 90, 4, 16): 16,
    ("bwd_dkdv_grouped", 90, 4, 128): 16,
    # The same for the loop over heads.
    ("bwd_dkdv_grouped", 86, 4, 256): 48,
    ("bwd_dkdv_grouped", 100, 2, 32): 48,
    ("bwd_dkdv_grouped", 80, 2, 64): 48,
    ("bwd_dkdv_grouped", 86, 2, 64): 48,
    ("bwd_dkdv_grouped", 89, 2, 64): 48,
}

# Where a sequence begins and how wide the window is: numbers that wait outside the loops.
ADMITTED_WINDOWED_OR_PACKED = 24

# On CPU, under the interpreter: few programs and few steps, each as large as NumPy likes, but
# small and unequal enough that a short sequence still has several ragged blocks.
INTERPRETED = {
    "fwd": LaunchConfig(64, 32, 4, 1),
    "bwd_dkdv": LaunchConfig(32, 64, 4, 1),
    "bwd_dkdv_grouped": LaunchConfig(32, 64, 4, 1),
    "bwd_dq": LaunchConfig(64, 32, 4, 1),
}
# The preprocessing kernel only reads and adds up: any tile of this many elements will do.
PREPROCESS_ELEMENTS = 2048


def block_d(head_dim: int) -> int:
    """The head dimension as a tile sees it: rounded up to a power of two, 16 at least.

    The padding is computed with and thrown away: D = 72 costs what D = 128 costs.
    """
    return max(16, 1 << (head_dim - 1).bit_length())


def table_architecture(capability: tuple[int, int]) -> int | None:
    """Which rows of the table a GPU of this compute capability uses; None where it has none.

    GPUs that are not listed use the rows of the closest relative with as much shared memory or
    less: sm_89 and sm_120 those of sm_86 (99 KB), sm_103 those of sm_100.
    """
    major, minor = capability
    version = 10 * major + minor
    if version < 75:
        return None
    if version >= 110:
        return 86
    return max(arch for arch in (75, 80, 86, 90, 100) if arch <= version)


def launch_config(
    kernel: str,
    arch: int | None,
    head_dim: int,
    itemsize: int,
    *,
    windowed_or_packed: bool = False,
) -> LaunchConfig:
    """Look up one kernel's configuration.

    Args:
        kernel: "fwd", "bwd_preprocess", "bwd_dkdv", "bwd_dkdv_grouped" (several query heads a kv
            head) or "bwd_dq".
        arch: What :func:`table_architecture` gave; None under the interpreter.
        head_dim: D, in elements.
        itemsize: Bytes an element: 2 or 4.
        windowed_or_packed: Whether the launch has a sliding window or a packed batch.

    Raises:
        ValueError: The table has no such row (sm_75 above D = 128).
    """
    if kernel == "bwd_preprocess":
        rows = min(PREPROCESS_ELEMENTS // block_d(head_dim), 128)
        return LaunchConfig(BLOCK_M=rows, BLOCK_N=0, num_warps=4, num_stages=1)
    if arch is None:
        return INTERPRETED[kernel]
    row = TABLE[kernel][arch, itemsize][BLOCK_DS.index(block_d(head_dim))]
    if windowed_or_packed:
        row = WINDOWED_OR_PACKED.get((kernel, arch, itemsize, block_d(head_dim)), row)
    if row is None:
        raise ValueError(f"no {kernel} configuration for sm_{arch} and head dimension {head_dim}")
    return LaunchConfig(*row)


# ---- the list for the compile gate ---------------------------------------------------------


EXTENTS = ("sequences", "Hq", "Hkv", "Tq", "Tk", "left", "right")
Mask = Literal["full", "causal", "window"]


def signature_of(kernel: Any, dtype: str) -> dict[str, str]:
    """Types of a kernel's run-time arguments, read off their names as this chapter spells them."""
    types = {}
    for name in kernel.arg_names:
        if name in ("lse_ptr", "dlse_ptr", "delta_ptr"):
            types[name] = "*fp32"
        elif name.startswith("cu_seqlens"):
            types[name] = "*i32"
        elif name.endswith("_ptr"):
            types[name] = f"*{dtype}"
        elif name.startswith("scale"):
            types[name] = "fp32"
        elif name.startswith("stride_") or name in EXTENTS:
            types[name] = "i32"
    return types


def kernel_launch(
    kernel: str,
    arch: int,
    head_dim: int,
    dtype: str,
    *,
    mask: Mask,
    varlen: bool = False,
    config: LaunchConfig | None = None,
) -> Launch:
    """One launch, for the compile gate; ``config`` stands in for the table's when one is tuned."""
    from course_lib.runtime.crosscompile import Launch

    from . import kernels

    function = getattr(kernels, f"flash_attention_{kernel.removesuffix('_grouped')}_kernel")
    itemsize = 4 if dtype == "fp32" else 2
    more = mask == "window" or varlen
    admitted = ADMITTED_SPILLS.get((kernel, arch, itemsize, block_d(head_dim)), 0)
    if more:
        admitted = ADMITTED_WINDOWED_OR_PACKED
    if config is None:
        rows = table_architecture(divmod(arch, 10))
        config = launch_config(kernel, rows, head_dim, itemsize, windowed_or_packed=more)
    constexprs: dict[str, Any] = {
        "GROUPED": kernel.endswith("_grouped"),
        "CAUSAL": mask == "causal",
        "WINDOWED": mask == "window",
        "VARLEN": varlen,
        "ALIGN": 16,
        "D": head_dim,
        "BLOCK_D": block_d(head_dim),
        "BLOCK_M": config.BLOCK_M,
        "BLOCK_N": config.BLOCK_N,
    }
    signature = signature_of(function, dtype)
    if not varlen:  # a launch passes None for them, which is a constant to Triton
        for name in ("cu_seqlens_q_ptr", "cu_seqlens_k_ptr"):
            signature.pop(name, None)
            constexprs[name] = None
    return Launch(
        name=f"{kernel}/sm_{arch}/d{head_dim}/{dtype}/{mask}" + ("/varlen" if varlen else ""),
        kernel=function,
        signature=signature,
        constexprs={n: v for n, v in constexprs.items() if n in function.arg_names},
        arch=arch,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        admitted_spills=admitted,
    )


# Every entry of the table is compiled for a batch, with and without the causal mask. Windows and
# packed batches cost a few registers more: they are compiled at the head dimensions that models
# have, in half precision.
MODES: tuple[tuple[Mask, bool], ...] = (("full", False), ("causal", False))
MORE_MODES: tuple[tuple[Mask, bool], ...] = (
    ("window", False),
    ("causal", True),
    ("window", True),
)


def _launches() -> Iterator[Launch]:
    for kernel, rows in TABLE.items():
        for (arch, itemsize), row in rows.items():
            dtype = "fp32" if itemsize == 4 else "fp16" if arch == 75 else "bf16"
            for head_dim, config in zip(BLOCK_DS, row, strict=True):
                if config is None:
                    continue
                modes = MODES
                if arch >= 80 and itemsize == 2 and head_dim in (64, 128):
                    modes += MORE_MODES
                for mask, varlen in modes:
                    yield kernel_launch(kernel, arch, head_dim, dtype, mask=mask, varlen=varlen)
                    if (arch, itemsize) == (86, 2):
                        yield kernel_launch(kernel, 89, head_dim, dtype, mask=mask, varlen=varlen)
    # What the rows above do not show: padded head dimensions, and the other half dtype.
    for arch in (80, 89, 90, 100):
        for kernel in TABLE:
            yield kernel_launch(kernel, arch, 72, "bf16", mask="causal")
            yield kernel_launch(kernel, arch, 80, "bf16", mask="full")
            yield kernel_launch(kernel, arch, 128, "fp16", mask="causal")
    for arch in (75, 80, 86, 89, 90, 100):
        for head_dim in BLOCK_DS:
            for dtype in ("fp16" if arch == 75 else "bf16", "fp32"):
                yield kernel_launch("bwd_preprocess", arch, head_dim, dtype, mask="full")
    from . import decode_launches, merge_launches

    yield from merge_launches.launches()
    yield from decode_launches.launches()


def __getattr__(name: str) -> Any:
    # A list of kernels needs Triton; looking a configuration up does not.
    if name == "LAUNCHES":
        return list(_launches())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
