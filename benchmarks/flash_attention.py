"""FlashAttention against PyTorch: ours, SDPA with the backend forced, and the plain formula.

On a GPU the lengths go up to 16k in bf16. On CPU it is a smoke run: the same code on small sizes,
so that the script cannot rot; its figures say nothing about a GPU.
"""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from course_lib.flash_attention import flash_attention, reference_attention
from course_lib.flash_attention.cases import Case, Inputs, make_inputs
from course_lib.runtime.measure import measure_memory, time_interleaved

FLOP_FORMULA = (
    "forward 4*D for every visible (query, key) pair of every head; backward 2.5 times that, as is "
    "the custom, whatever an implementation computes twice"
)
BACKWARD_FLOPS = 2.5
# The plain formula makes several [B, H, T, T] tensors; above this many scores it is left out.
PLAIN_SCORES = 2**31


def gpu_cases() -> Iterator[Case]:
    """16k tokens a batch, 2048 features: the sizes that published figures use."""
    for D in (64, 128):
        for causal in (False, True):
            for T in (512, 1024, 2048, 4096, 8192, 16384):
                heads = 2048 // D
                name = f"T{T}/D{D}/{'causal' if causal else 'full'}"
                yield Case(name, "large", 16384 // T, heads, heads, T, T, D, causal)
    yield Case("T4095/D128/causal", "large", 4, 16, 16, 4095, 4095, 128, causal=True)
    yield Case("T4096/D128/causal/group8", "large", 4, 16, 2, 4096, 4096, 128, causal=True)
    yield Case("T4096/D72/full", "large", 4, 16, 16, 4096, 4096, 72)


def cpu_cases() -> Iterator[Case]:
    """Small enough for two cores and a few seconds."""
    yield Case("T256/D64/full", "small", 1, 4, 4, 256, 256, 64)
    yield Case("T511/D64/causal", "small", 1, 4, 2, 511, 511, 64, causal=True)


def implementations(case: Case, device: torch.device) -> dict[str, Callable[..., Tensor]]:
    """What can be compared on this device, by name."""
    ours = functools.partial(flash_attention, causal=case.causal, scale=case.scale)
    found: dict[str, Callable[..., Tensor]] = {}
    sdpa = functools.partial(
        F.scaled_dot_product_attention,
        is_causal=case.causal,
        scale=case.scale,
        enable_gqa=case.Hq != case.Hkv,
    )
    if device.type == "cuda":
        found["ours_triton"] = functools.partial(ours, implementation="triton")
        for name, backend in (
            ("sdpa_cudnn", SDPBackend.CUDNN_ATTENTION),
            ("sdpa_flash", SDPBackend.FLASH_ATTENTION),
        ):
            found[name] = functools.partial(_with_backend, sdpa, backend)
    else:
        found["ours_torch"] = functools.partial(ours, implementation="torch")
        found["sdpa"] = sdpa
    if case.B * case.Hq * case.Tq * case.Tk <= PLAIN_SCORES:
        found["plain"] = functools.partial(
            reference_attention, causal=case.causal, scale=case.scale
        )
    return found


def _with_backend(function: Callable[..., Tensor], backend: SDPBackend, *args: Tensor) -> Tensor:
    with sdpa_kernel([backend]):
        return function(*args)


def measure(device: torch.device, *, repeats: int, smoke: bool) -> list[dict[str, Any]]:
    """Time and peak memory of every case and implementation, forward and backward apart."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    cases = list(cpu_cases() if smoke or device.type != "cuda" else gpu_cases())
    records = []
    for case in cases:
        inputs = make_inputs(case, dtype, device=device)
        runnable = {
            name: function
            for name, function in implementations(case, device).items()
            if _runs(function, inputs)
        }
        forward = {
            name: functools.partial(function, inputs.q, inputs.k, inputs.v)
            for name, function in runnable.items()
        }
        backward = {name: _backward_of(function, inputs) for name, function in runnable.items()}
        for direction, functions, factor in (
            ("forward", forward, 1.0),
            ("backward", backward, BACKWARD_FLOPS),
        ):
            timings = time_interleaved(functions, repeats=repeats, device=device)
            flops = factor * case.flops()
            for name, timing in timings.items():
                records.append(
                    {
                        "case": case.name,
                        "shape": {
                            key: getattr(case, key) for key in ("B", "Hq", "Hkv", "Tq", "Tk", "D")
                        },
                        "causal": case.causal,
                        "dtype": str(dtype).removeprefix("torch."),
                        "direction": direction,
                        "implementation": name,
                        "seconds": {"median": timing.median, "p20": timing.p20, "p80": timing.p80},
                        "calls": timing.n,
                        "flops": flops,
                        "tflops_per_second": flops / timing.median / 1e12,
                        "peak_bytes": _peak_bytes(functions[name], device),
                    }
                )
        # A graph that is kept alive holds its memory: drop it before the next case.
        del forward, backward, inputs
        gc.collect()
    return records


def _backward_of(function: Callable[..., Tensor], inputs: Inputs) -> Callable[[], object]:
    leaves = [x.detach().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, inputs.dout, retain_graph=True)


def _runs(function: Callable[..., Tensor], inputs: Inputs) -> bool:
    """Whether an implementation takes this case: a forced backend may refuse."""
    try:
        out = function(inputs.q, inputs.k, inputs.v)
    except RuntimeError:
        return False
    return math.isfinite(out.float().sum().item())


def _peak_bytes(function: Callable[[], object], device: torch.device) -> int:
    """Bytes at the highest point above what was there before the call."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with measure_memory() as memory:
        function()
    return memory.peak_bytes
