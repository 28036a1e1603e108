"""FlashAttention against its peers: dense, grouped, windowed and packed batches, and decoding.

On a GPU the lengths go up to 16k in bf16, and to 131k keys in decoding. On CPU it is a smoke run:
the same code on small sizes, so that the script cannot rot; its figures say nothing about a GPU.

An implementation is timed only after its result was compared: ours with the formula in fp64 on a
sample of rows, every other with ours. One that refuses, or that computes something else, stands in
the results with the reason.
"""

from __future__ import annotations

import fnmatch
import functools
import gc
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from benchmarks import goals
from benchmarks.attention_cases import BenchCase, Layout, Packed, cpu_cases, draw, gpu_cases
from benchmarks.attention_peers import OURS, OURS_PADDED, Prepared, Refused, peers, reason_of
from benchmarks.goals import report
from benchmarks.machine import gpu_state
from course_lib.runtime.measure import Timing, measure_memory, time_interleaved

__all__ = [
    "FLOP_FORMULA",
    "TOLERANCE",
    "as_graph",
    "judge",
    "measure",
    "relative_distance",
    "report",
]

FLOP_FORMULA = (
    "forward 4*D for every visible (query, key) pair of every query head; backward 2.5 times that, "
    "as is the custom, whatever an implementation computes twice; what a padded batch computes in "
    "vain is not counted, but for ours_padded, whose problem it is"
)
BACKWARD_FLOPS = 2.5

# Up to this distance two results are the same: some times what rounding does, and, in an output,
# less than one key too many does to a window of a thousand.
TOLERANCE = {
    ("forward", torch.bfloat16): 1e-2,
    ("backward", torch.bfloat16): 3e-2,
    ("forward", torch.float32): 1e-4,
    ("backward", torch.float32): 1e-3,
}

Call = Callable[[], object]


def measure(
    device: torch.device,
    *,
    repeats: int,
    smoke: bool,
    only: str = "*",
    skip: Sequence[str] = (),
) -> Iterator[dict[str, Any]]:
    """Time and peak memory of every case and implementation, forward and backward apart.

    Args:
        device: Where.
        repeats: Calls measured.
        smoke: The small cases.
        only: A glob of case names.
        skip: Implementations that are left out.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    for case in cpu_cases() if smoke or device.type != "cuda" else gpu_cases():
        if fnmatch.fnmatchcase(case.name, only):
            yield from CaseRun(case, dtype, device, repeats, skip).records()
            # A graph that is kept alive holds its memory: drop it before the next case.
            gc.collect()
            if device.type == "cuda":
                torch.cuda.empty_cache()


def judge(records: list[dict[str, Any]], environment: dict[str, Any]) -> list[dict[str, Any]]:
    """Ours beside every peer, and beside the goals."""
    names = {r["implementation"] for r in records if r["implementation"].startswith(OURS)}
    judged = []
    for ours in sorted(names - {OURS_PADDED}):
        judged += goals.ratios("flash_attention", ours, records, environment["device"])
    return judged


class CaseRun:
    """One case: every implementation prepared, compared and timed."""

    def __init__(
        self,
        case: BenchCase,
        dtype: torch.dtype,
        device: torch.device,
        repeats: int,
        skip: Sequence[str] = (),
    ) -> None:
        self.case = case
        self.dtype = dtype
        self.device = device
        self.repeats = repeats
        self.peers = {name: p for name, p in peers(case, device).items() if name not in skip}
        self.packed = draw(case, dtype, device)
        self.prepared: dict[str, Prepared] = {}
        # By name of a tensor, who gave it first, and what, packed: the others must agree.
        self.expected: dict[str, tuple[str, Tensor]] = {}
        self._laid_out: dict[Layout, tuple[Tensor, Tensor, Tensor, Tensor]] = {}

    def records(self) -> Iterator[dict[str, Any]]:
        """Forward and, unless one new token is decoded, backward."""
        yield from self._direction("forward", self._forward, 1.0)
        if self.case.kind != "decode":
            yield from self._direction("backward", self._backward, BACKWARD_FLOPS)

    def _direction(
        self, direction: str, prepare: Callable[[str], Call], factor: float
    ) -> Iterator[dict[str, Any]]:
        calls: dict[str, Call] = {}
        refused: dict[str, str] = {}
        names = [*self.peers] if direction == "forward" else [*self.prepared]
        for name in names:
            with warnings.catch_warnings(record=True) as heard:
                warnings.simplefilter("always")
                try:
                    calls[name] = prepare(name)
                # Each library raises types of its own, and each of them is a finding.
                except Exception as error:
                    refused[name] = reason_of(error, heard)
        timed: dict[str, tuple[Call, dict[str, Any]]] = {}
        try:
            timed |= {name: self._timed(call) for name, call in calls.items()}
            timings = time_interleaved(
                {name: call for name, (call, _) in timed.items()},
                repeats=self.repeats,
                device=self.device,
            )
        except Exception as error:  # such as memory, which all of them share
            timings = {}
            refused |= dict.fromkeys(calls, f"timing failed: {reason_of(error, [])}")
        state = gpu_state(self.device)
        for name in names:
            record = self._identity(direction, name)
            if name in refused:
                yield record | {"refused": refused[name]}
                continue
            case = self.prepared[name].case or self.case
            yield (
                record
                | self._figures(timings[name], factor * case.flops())
                | {"peak_bytes": _peak_bytes(calls[name], self.device)}
                | self._host(calls[name], timings[name], timed[name][1])
                | state
            )

    # ---- one implementation --------------------------------------------------------------------

    def _forward(self, name: str) -> Call:
        prepared = self.peers[name]()
        inputs = self._tensors(prepared.layout)[:3]
        with torch.no_grad():
            out = prepared.run(*inputs)
        if "forward" in prepared.comparable:
            packed = prepared.layout.back(out, self.case.q_lengths)
            self._compare("forward", name, {"out": packed})
        self.prepared[name] = prepared
        return functools.partial(_without_grad, prepared.run, inputs)

    def _backward(self, name: str) -> Call:
        prepared = self.prepared[name]
        *inputs, dout = self._tensors(prepared.layout)
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = prepared.run(*leaves)
        grads = torch.autograd.grad(out, leaves, dout, retain_graph=True)
        if "backward" in prepared.comparable:
            lengths = (self.case.q_lengths, self.case.k_lengths, self.case.k_lengths)
            packed = [prepared.layout.back(*pair) for pair in zip(grads, lengths, strict=True)]
            self._compare("backward", name, dict(zip(("dq", "dk", "dv"), packed, strict=True)))
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    def _tensors(self, layout: Layout) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """q, k, v and dout, once for each layout: they are gigabytes."""
        if layout not in self._laid_out:
            packed, case = self.packed, self.case
            self._laid_out[layout] = (
                layout.there(packed.q, case.q_lengths),
                layout.there(packed.k, case.k_lengths),
                layout.there(packed.v, case.k_lengths),
                layout.there_for_dout(packed.dout, case.q_lengths),
            )
        return self._laid_out[layout]

    def _compare(self, direction: str, name: str, found: dict[str, Tensor]) -> None:
        """Raise ``Refused`` unless the first output is the formula's, and all else the first's."""
        for key, actual in found.items():
            first, distance = name, 0.0
            if key in self.expected:
                first, expected = self.expected[key]
                distance_of = row_distance if key == "out" else relative_distance
                distance = distance_of(actual, expected)
            elif key == "out":
                first, distance = "the formula", sample_distance(self.case, self.packed, actual)
            if not distance <= TOLERANCE[direction, self.dtype]:
                raise Refused(f"{key} differs from {first} by {distance:.1e} of its norm")
        self.expected = {key: (name, x) for key, x in found.items()} | self.expected

    def _timed(self, call: Call) -> tuple[Call, dict[str, Any]]:
        """What is timed: the call, or in decoding its CUDA graph, as it is served."""
        if self.case.kind != "decode" or self.device.type != "cuda":
            return call, {}
        try:
            return as_graph(call), {"timed": "replay of a CUDA graph"}
        except Exception as error:
            torch.cuda.synchronize(self.device)
            return call, {"timed": f"one by one: {reason_of(error, [])}"}

    # ---- one record ----------------------------------------------------------------------------

    def _identity(self, direction: str, name: str) -> dict[str, Any]:
        case = self.case
        record = {
            "case": case.name,
            "shape": case.shape(),
            "causal": case.causal,
            "window_size": list(case.window_size),
            "dtype": str(self.dtype).removeprefix("torch."),
            "direction": direction,
            "implementation": name,
        }
        note = self.prepared[name].note if name in self.prepared else ""
        return record | ({"note": note} if note else {})

    def _figures(self, timing: Timing, flops: float) -> dict[str, Any]:
        figures: dict[str, Any] = {
            "seconds": {"median": timing.median, "p20": timing.p20, "p80": timing.p80},
            "calls": timing.n,
            "flops": flops,
            "tflops_per_second": flops / timing.median / 1e12,
        }
        if self.case.kind == "decode":
            nbytes = self.case.kv_bytes(self.dtype.itemsize)
            figures |= {
                "tokens_per_second": len(self.case.q_lengths) / timing.median,
                "kv_bytes": nbytes,
                "kv_bytes_per_second": nbytes / timing.median,
            }
        return figures

    def _host(self, call: Call, timing: Timing, how: dict[str, Any]) -> dict[str, Any]:
        """How long the host needs to launch it; a GPU that waits for its host shows only that."""
        if self.device.type != "cuda":
            return {}
        host = _host_seconds(call, self.device)
        launched_singly = not how.get("timed", "").startswith("replay")
        return {
            "host_seconds": host,
            "host_bound": launched_singly and host > timing.median,
            **how,
        }


def relative_distance(actual: Tensor, expected: Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖, in fp32 or more; NaN where there is one."""
    wide = torch.promote_types(actual.dtype, torch.float32)
    distance = torch.linalg.vector_norm(actual.to(wide) - expected.to(wide))
    return (distance / torch.linalg.vector_norm(expected.to(wide)).clamp_min(1e-30)).item()


def row_distance(actual: Tensor, expected: Tensor) -> float:
    """The same row by row, as a root mean square over the rows; for outputs.

    A row over a thousand keys is a mean, thirty times smaller than a row over one: seen whole, the
    first rows of a causal output would hide what is wrong with all others.
    """
    wide = torch.promote_types(actual.dtype, torch.float32)
    norms = torch.linalg.vector_norm(expected.to(wide), dim=-1)
    floor = (1e-3 * norms.max()).clamp_min(1e-30)  # for rows that see no key, and are zero
    distances = torch.linalg.vector_norm(actual.to(wide) - expected.to(wide), dim=-1)
    return (distances / norms.clamp_min(floor)).square().mean().sqrt().item()


def sample_distance(case: BenchCase, packed: Packed, out: Tensor, *, rows: int = 32) -> float:
    """How far an output lies from the formula, on the first and last rows of a few sequences.

    Args:
        case: What was computed.
        packed: Its inputs.
        out: [tokens, Hq, D], packed.
        rows: How many rows at either end.
    """
    longest = max(range(len(case.q_lengths)), key=lambda s: case.k_lengths[s])
    starts_q, starts_k = ([0, *accumulate(x)] for x in (case.q_lengths, case.k_lengths))
    actual, expected = [], []
    for n, s in enumerate(sorted({0, longest, len(case.q_lengths) - 1})):
        Tq, Tk = case.q_lengths[s], case.k_lengths[s]
        head = n * (case.Hq - 1) // 2
        queries = torch.cat([torch.arange(min(rows, Tq)), torch.arange(max(Tq - rows, 0), Tq)])
        queries = queries.to(out.device)
        kv_head = head // (case.Hq // case.Hkv)
        keys = slice(starts_k[s], starts_k[s] + Tk)
        q = packed.q[starts_q[s] + queries, head].double()
        k, v = (x[keys, kv_head].double() for x in (packed.k, packed.v))
        scores = q @ k.T / math.sqrt(case.D)  # [rows, Tk]
        ahead = torch.arange(Tk, device=out.device)[None] - (queries[:, None] + Tk - Tq)
        left, right = case.band.clipped(max(Tq, Tk))
        scores = scores.masked_fill((ahead < -left) | (ahead > right), -math.inf)
        expected.append(torch.softmax(scores, dim=-1) @ v)
        actual.append(out[starts_q[s] + queries, head])
    return row_distance(torch.cat(actual), torch.cat(expected))


def _without_grad(function: Callable[..., Tensor], inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return function(*inputs)


def as_graph(call: Call) -> Call:
    """The call as a CUDA graph: what takes microseconds must not wait for Python to launch it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def _host_seconds(call: Call, device: torch.device, *, repeats: int = 5) -> float:
    """Until the call returns, with nothing before it in the queue; median."""
    seconds = []
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    torch.cuda.synchronize(device)
    return statistics.median(seconds)


def _peak_bytes(call: Call, device: torch.device) -> int:
    """Bytes at the highest point above what was there before the call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with measure_memory() as memory:
        call()
    return memory.peak_bytes
