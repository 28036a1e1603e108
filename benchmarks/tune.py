"""Look for a better launch configuration: list, compile, discard what spills, time the rest.

    python -m benchmarks.tune flash_attention --kernel fwd --arch 90 --head-dim 128
        [--dtype bf16] [--block-m 64,128] [--block-n 32,64,128] [--warps 4,8] [--stages 2,3,4]
        [--admit BYTES] [--write-plan FILE | --plan FILE] [--repeats 50] [--json FILE]
    python -m benchmarks.tune flash_attention --splits 1,2,4,8,16,32,64,128

    The second line is for decoding: parts of the keys against what ``choose_splits`` takes.

The first half needs no GPU: every configuration is compiled for the architecture, in every mode
that the compile gate holds the table to, and one that spills, or does not fit, is discarded with
the reason; ``--admit`` lets a few bytes pass. The second half needs the GPU: the survivors are
timed against the table's row, one process, in turns, each after its result was compared with the
table's. A plan made on a machine without a GPU is read with ``--plan`` on the one that has it, so
that no GPU waits for a compiler; under another Triton its survivors are compiled and held to the
gate again.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.attention_cases import BATCH, BenchCase, draw
from benchmarks.flash_attention import TOLERANCE, as_graph, relative_distance
from benchmarks.machine import environment
from course_lib.flash_attention import (
    decode_launches,
    flash_attention,
    flash_attention_decode,
    launches,
)
from course_lib.flash_attention.dispatch import Implementation
from course_lib.flash_attention.launches import BLOCK_DS, LaunchConfig, block_d
from course_lib.runtime.crosscompile import Launch, check_launches
from course_lib.runtime.measure import Timing, time_interleaved
from course_lib.runtime.tile import triton

__all__ = ["Plan", "main", "make_plan", "ranking", "space", "table_row", "time_plan"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
FINALISTS = 8
REGISTERS = 255  # 32-bit registers that a thread can have

TABLES = launches.TABLE | decode_launches.TABLE


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is worth a GPU's time, and what is not, with the reason."""

    kernel: str
    arch: int
    head_dim: int
    dtype: str
    admit: int
    triton: str
    table: LaunchConfig  #: the row that the table has
    candidates: tuple[LaunchConfig, ...]
    discarded: dict[str, str]  #: by configuration in words

    def as_json(self) -> str:
        """For a file."""
        return json.dumps(dataclasses.asdict(self), indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Back from a file.

        Raises:
            ValueError: It is not a plan.
        """
        try:
            facts = json.loads(text)
            table = LaunchConfig(**facts.pop("table"))
            candidates = tuple(LaunchConfig(**each) for each in facts.pop("candidates"))
            return cls(**facts, table=table, candidates=candidates)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"not a plan that --write-plan wrote: {error}") from None


# ---- without a GPU -------------------------------------------------------------------------


def space(
    block_m: Iterable[int], block_n: Iterable[int], warps: Iterable[int], stages: Iterable[int]
) -> list[LaunchConfig]:
    """Every combination."""
    return [LaunchConfig(*each) for each in itertools.product(block_m, block_n, warps, stages)]


def make_plan(
    kernel: str,
    arch: int,
    head_dim: int,
    dtype: str,
    configs: Iterable[LaunchConfig],
    *,
    admit: int = 0,
    report: Callable[[str], None] = lambda line: None,
) -> Plan:
    """Compile every configuration, and keep what passes the gate that the table has to pass.

    Args:
        kernel: One of the tables': "fwd", "bwd_dkdv", "bwd_dkdv_grouped", "bwd_dq", "decode",
            "decode_rows".
        arch: One that the table has rows for, 90 for sm_90.
        head_dim: D.
        dtype: "bf16", "fp16" or "fp32".
        configs: What to try; the table's own row is left out.
        admit: Bytes a thread that may spill all the same.
        report: Called with a line for each configuration.

    Raises:
        ValueError: The table has no such row.
    """
    itemsize = DTYPES[dtype].itemsize
    row = TABLES[kernel].get((arch, itemsize), [None] * len(BLOCK_DS))
    entry = row[BLOCK_DS.index(block_d(head_dim))]
    if entry is None:
        raise ValueError(f"the table has no {kernel} for sm_{arch}, {dtype} and D = {head_dim}")
    table = LaunchConfig(*entry)
    kept: list[LaunchConfig] = []
    discarded: dict[str, str] = {}
    for config in configs:
        if config == table:
            continue
        reason = _too_large(kernel, arch, head_dim, config) or _fails_the_gate(
            kernel, arch, head_dim, dtype, config, admit
        )
        if reason:
            discarded[words(config)] = reason
        else:
            kept.append(config)
        report(f"  {words(config)}: {reason or 'passes'}")
    version = triton.__version__
    return Plan(kernel, arch, head_dim, dtype, admit, version, table, tuple(kept), discarded)


def words(config: LaunchConfig) -> str:
    """A configuration as the table writes it."""
    return str(dataclasses.astuple(config))


def _too_large(kernel: str, arch: int, head_dim: int, config: LaunchConfig) -> str | None:
    """Why it needs no compiler to be discarded: its sums alone are more than the registers."""
    if arch >= 100:  # where they live in a memory of their own
        return None
    D = block_d(head_dim)
    sums = 2 * config.BLOCK_N * D if "dkdv" in kernel else config.BLOCK_M * D
    held = (sums + config.BLOCK_M * config.BLOCK_N) // (32 * config.num_warps)
    if held > REGISTERS:
        return f"needs {held} registers a thread for sums and scores alone"
    return None


def _fails_the_gate(
    kernel: str, arch: int, head_dim: int, dtype: str, config: LaunchConfig, admit: int
) -> str | None:
    """The first rule that it breaks, in any mode; None if it keeps them all."""
    for launch in modes_of(kernel, arch, head_dim, dtype, config):
        admitted = max(admit, launch.admitted_spills)
        failures = check_launches([dataclasses.replace(launch, admitted_spills=admitted)]).failures
        if failures:
            return failures[0]
    return None


def modes_of(
    kernel: str, arch: int, head_dim: int, dtype: str, config: LaunchConfig
) -> Iterator[Launch]:
    """Everything that an entry of the table is compiled as: masks and packing, or splits."""
    if kernel in decode_launches.TABLE:
        for split in (True, False):
            yield decode_launches.decode_launch(
                kernel, arch, head_dim, dtype, split=split, config=config
            )
        return
    modes = launches.MODES
    if arch >= 80 and dtype != "fp32" and head_dim in (64, 128):
        modes += launches.MORE_MODES
    # Causal first: most of what fails, fails there.
    for mask, varlen in sorted(modes, key=lambda mode: mode != ("causal", False)):
        yield launches.kernel_launch(
            kernel, arch, head_dim, dtype, mask=mask, varlen=varlen, config=config
        )


@contextlib.contextmanager
def table_row(plan: Plan) -> Iterator[Callable[[LaunchConfig], None]]:
    """Put configurations into the table, where every launch looks them up; the row comes back.

    Yields:
        A function that makes a configuration the row of the plan's kernel.
    """
    rows = TABLES[plan.kernel][plan.arch, DTYPES[plan.dtype].itemsize]
    index = BLOCK_DS.index(block_d(plan.head_dim))
    before = rows[index]

    def use(config: LaunchConfig) -> None:
        rows[index] = (config.BLOCK_M, config.BLOCK_N, config.num_warps, config.num_stages)

    try:
        yield use
    finally:
        rows[index] = before


# ---- with a GPU ----------------------------------------------------------------------------


def tuning_cases(plan: Plan) -> list[BenchCase]:
    """What a kernel is timed on: the sizes of the goals, 16384 tokens a batch and 2048 features."""
    heads, D = max(2048 // block_d(plan.head_dim), 4), plan.head_dim
    if plan.kernel in decode_launches.TABLE:
        # Sixteen rows or less use one table, more the other.
        return decode_cases(*((32, 8) if plan.kernel == "decode" else (64, 2)), D)
    kv_heads = heads // 4 if plan.kernel.endswith("_grouped") else heads
    lengths = (4096,) * 4
    return [
        BenchCase(name, "dense", lengths, lengths, heads, kv_heads, D, causal=name == "causal")
        for name in ("full", "causal")
    ]


def decode_cases(heads: int, kv_heads: int, D: int) -> list[BenchCase]:
    """From one long cache to many short ones."""
    sizes = ((1, 4096), (1, 131072), (4, 8192), (16, 8192), (40, 8192), (64, 2048), (64, 8192))
    return [
        BenchCase(f"B{B}/Tk{Tk}", "decode", (1,) * B, (Tk,) * B, heads, kv_heads, D)
        for B, Tk in sizes
    ]


def time_plan(
    plan: Plan, cases: Iterable[BenchCase], device: torch.device, *, repeats: int
) -> dict[str, dict[LaunchConfig, Timing]]:
    """Time the pass that the kernel is part of, with every candidate and with the table's row.

    Args:
        plan: What to time.
        cases: On what.
        device: A GPU of the plan's architecture.
        repeats: Calls measured of each finalist, after a short round that chooses them.

    Returns:
        Timings by case and configuration. A candidate that computes something else is reported
        and left out.
    """
    with table_row(plan) as use:
        return {case.name: _time_case(plan, case, device, repeats, use) for case in cases}


def _time_case(
    plan: Plan,
    case: BenchCase,
    device: torch.device,
    repeats: int,
    use: Callable[[LaunchConfig], None],
) -> dict[LaunchConfig, Timing]:
    call = _pass_of(plan, case, device)

    def with_config(config: LaunchConfig) -> tuple[torch.Tensor, ...]:
        use(config)
        return call()

    expected = [x.detach().clone() for x in with_config(plan.table)]
    direction = "backward" if plan.kernel.startswith("bwd") else "forward"
    tolerance = TOLERANCE[direction, torch.float32 if plan.dtype == "fp32" else torch.bfloat16]
    calls: dict[LaunchConfig, Callable[[], object]] = {}
    for config in (plan.table, *plan.candidates):
        try:
            actual = with_config(config)
            distance = max(map(relative_distance, actual, expected))
            if not distance <= tolerance:
                print(f"  {words(config)}: differs from the table's by {distance:.1e} of its norm")
                continue
            calls[config] = functools.partial(with_config, config)
            if case.kind == "decode" and device.type == "cuda":
                calls[config] = as_graph(calls[config])
        except Exception as error:  # the driver has the last word on what can be launched
            print(f"  {words(config)}: cannot be launched, {type(error).__name__}: {error}")
    names = {words(config): config for config in calls}
    quick = time_interleaved({w: calls[c] for w, c in names.items()}, repeats=5, device=device)
    best = sorted(quick, key=lambda word: quick[word].median)[:FINALISTS]
    finalists = dict.fromkeys([words(plan.table), *best])
    timings = time_interleaved(
        {word: calls[names[word]] for word in finalists}, repeats=repeats, device=device
    )
    return {names[word]: timing for word, timing in timings.items()}


def time_splits(
    splits: Iterable[int],
    cases: Iterable[BenchCase],
    device: torch.device,
    *,
    repeats: int,
    implementation: Implementation = "triton",
) -> dict[str, dict[str, Timing]]:
    """Time decoding with these numbers of splits, and with the one that our rule takes.

    Returns:
        Timings by case and number of splits; "rule" is ours.
    """
    found = {}
    for case in cases:
        packed = draw(case, torch.bfloat16, device)
        q = BATCH.there(packed.q, case.q_lengths)
        k, v = (BATCH.there(x, case.k_lengths) for x in (packed.k, packed.v))
        calls: dict[str, Callable[[], object]] = {}
        for each in (None, *splits):
            call = functools.partial(
                flash_attention_decode, q, k, v, splits=each, implementation=implementation
            )
            calls["rule" if each is None else str(each)] = (
                as_graph(call) if device.type == "cuda" else call
            )
        found[case.name] = time_interleaved(calls, repeats=repeats, device=device)
    return found


def splits_in_words(timings: Mapping[str, Mapping[str, Timing]]) -> str:
    """One line a case: every number of splits by its time over that of the rule."""
    lines = ["time over that of the rule's choice, by number of splits"]
    for case, by_splits in timings.items():
        rule = by_splits["rule"]
        shares = (
            f"{splits}: {timing.median / rule.median:.2f}"
            for splits, timing in by_splits.items()
            if splits != "rule"
        )
        lines.append(f"  {case:16} rule {rule.median * 1e6:8.1f} µs   {'  '.join(shares)}")
    return "\n".join(lines)


def _pass_of(
    plan: Plan, case: BenchCase, device: torch.device
) -> Callable[[], tuple[torch.Tensor, ...]]:
    """The public function that launches the plan's kernel, or its backward."""
    packed = draw(case, DTYPES[plan.dtype], device)
    q, dout = (BATCH.there(x, case.q_lengths) for x in (packed.q, packed.dout))
    k, v = (BATCH.there(x, case.k_lengths) for x in (packed.k, packed.v))
    if case.kind == "decode":
        return lambda: (flash_attention_decode(q, k, v, implementation="triton"),)
    attention = functools.partial(flash_attention, causal=case.causal, implementation="triton")
    if plan.kernel == "fwd":
        return lambda: (attention(q, k, v),)
    leaves = [x.requires_grad_() for x in (q, k, v)]
    out = attention(*leaves)
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def ranking(
    plan: Plan, timings: Mapping[str, Mapping[LaunchConfig, Timing]]
) -> list[tuple[LaunchConfig, float, bool]]:
    """Finalists of all cases, best first.

    Returns:
        Configuration; speed over that of the table's row, as the geometric mean over the cases;
        and whether it is faster beyond both spreads in every case.
    """
    in_all = set.intersection(*(set(by_config) for by_config in timings.values()))
    ranked = []
    for config in in_all - {plan.table}:
        speedups, beyond = [], True
        for by_config in timings.values():
            table, own = by_config[plan.table], by_config[config]
            speedups.append(table.median / own.median)
            beyond &= own.p80 < table.p20
        mean = math.prod(speedups) ** (1 / len(speedups))
        ranked.append((config, mean, beyond))
    return sorted(ranked, key=lambda each: -each[1])


def verdict(plan: Plan, timings: Mapping[str, Mapping[LaunchConfig, Timing]]) -> str:
    """The finalists in words, and whether one belongs into the table."""
    lines = [f"{plan.kernel}, sm_{plan.arch}, D = {plan.head_dim}, {plan.dtype}"]
    for case, by_config in timings.items():
        lines.append(f"  {case}")
        for config, timing in sorted(by_config.items(), key=lambda each: each[1].median):
            mark = "  the table's" if config == plan.table else ""
            lines.append(
                f"    {words(config):20} {timing.median * 1e3:9.3f} ms "
                f"({timing.p20 * 1e3:.3f} to {timing.p80 * 1e3:.3f}){mark}"
            )
    ranked = ranking(plan, timings)
    better = next((each for each in ranked if each[1] > 1 and each[2]), None)
    if better is None:
        lines.append(f"  Nothing beats the table's {words(plan.table)} beyond the spread.")
    else:
        lines.append(
            f"  {words(better[0])} is × {better[1]:.3f} of {words(plan.table)}, in all cases."
        )
    return "\n".join(lines)


# ---- the command line ----------------------------------------------------------------------


def main(argv: Sequence[str] | None = None) -> int:
    """Plan, and where there is the GPU, time."""
    options, parser = _options(argv)
    if options.splits is not None:
        return _tune_splits(options)
    if options.plan is not None:
        try:
            plan = Plan.from_json(options.plan.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            parser.error(f"--plan {options.plan}: {error}")
        if plan.triton != triton.__version__:
            print(f"Planned with Triton {plan.triton}, this is {triton.__version__}: once more.")
            plan = make_plan(
                *(plan.kernel, plan.arch, plan.head_dim, plan.dtype, plan.candidates),
                admit=plan.admit,
                report=print,
            )
    else:
        configs = space(options.block_m, options.block_n, options.warps, options.stages)
        print(f"{len(configs)} configurations of {options.kernel} for sm_{options.arch}")
        try:
            plan = make_plan(
                *(options.kernel, options.arch, options.head_dim, options.dtype, configs),
                admit=options.admit,
                report=print,
            )
        except (ValueError, KeyError) as error:
            parser.error(f"no such row in the table: {error}")
    print(f"{len(plan.candidates)} to be timed against the table's {words(plan.table)}")
    if options.write_plan is not None:
        options.write_plan.write_text(plan.as_json(), encoding="utf-8")
        print(f"wrote {options.write_plan}")
        return 0
    here = torch.cuda.get_device_capability() if torch.cuda.is_available() else None
    if here is None or launches.table_architecture(here) != plan.arch:
        print(f"Nothing is timed: this machine has no GPU that uses the rows of sm_{plan.arch}.")
        return 0
    device = torch.device("cuda")
    timings = time_plan(plan, tuning_cases(plan), device, repeats=options.repeats)
    print(verdict(plan, timings))
    if options.json is not None:
        options.json.write_text(json.dumps(_document(plan, timings, device), indent=1) + "\n")
        print(f"wrote {options.json}")
    return 0


def _tune_splits(options: argparse.Namespace) -> int:
    if not torch.cuda.is_available():
        print("Nothing is timed: PyTorch sees no GPU here.")
        return 0
    device = torch.device("cuda")
    cases = decode_cases(32, 8, options.head_dim)
    timings = time_splits(options.splits, cases, device, repeats=options.repeats)
    print(splits_in_words(timings))
    if options.json is not None:
        seconds = {
            case: {splits: dataclasses.asdict(t) for splits, t in by_splits.items()}
            for case, by_splits in timings.items()
        }
        document = {"environment": environment(device), "seconds": seconds}
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    return 0


def _document(
    plan: Plan, timings: Mapping[str, Mapping[LaunchConfig, Timing]], device: torch.device
) -> dict[str, Any]:
    return {
        "environment": environment(device),
        "plan": dataclasses.asdict(plan),
        "seconds": {
            case: {words(config): dataclasses.asdict(t) for config, t in by_config.items()}
            for case, by_config in timings.items()
        },
    }


def _options(argv: Sequence[str] | None) -> tuple[argparse.Namespace, argparse.ArgumentParser]:
    def numbers(text: str) -> list[int]:
        return [int(each) for each in text.split(",")]

    def powers(text: str) -> list[int]:
        found = numbers(text)
        if any(each < 1 or each & (each - 1) for each in found):
            raise argparse.ArgumentTypeError(f"{text!r}: tiles and warps are powers of two")
        return found

    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("op", choices=["flash_attention"])
    parser.add_argument("--kernel", choices=list(TABLES), default="fwd")
    archs = sorted({arch for rows in TABLES.values() for arch, _ in rows})
    parser.add_argument("--arch", type=int, choices=archs, default=90)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--block-m", type=powers, default=[64, 128], metavar="N,N")
    parser.add_argument("--block-n", type=powers, default=[32, 64, 128], metavar="N,N")
    parser.add_argument("--warps", type=powers, default=[4, 8], metavar="N,N")
    parser.add_argument("--stages", type=numbers, default=[2, 3, 4], metavar="N,N")
    parser.add_argument("--splits", type=numbers, metavar="N,N", help="time these in decoding")
    parser.add_argument("--admit", type=int, default=0, metavar="BYTES", help="that may spill")
    parser.add_argument("--repeats", type=int, default=50, help="calls measured of a finalist")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--plan", type=Path, metavar="FILE", help="time an earlier plan")
    group.add_argument("--write-plan", type=Path, metavar="FILE", help="plan only")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the timings there")
    return parser.parse_args(argv), parser


if __name__ == "__main__":
    sys.exit(main())
