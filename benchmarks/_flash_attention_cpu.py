"""The chapter's CPU curve: three library calls against a loop over tiles, by tile size.

    python -m benchmarks._flash_attention_cpu [--json FILE]

One thread, N = 8192, d = 64, float32. The runs take turns; the median and the best of each are
kept, since on a machine that others use as well the best is closer to what the machine can do.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.machine import environment
from course_lib.runtime.measure import time_interleaved

TOKENS, HEAD_DIM = 8192, 64
TILES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
RECORDED = Path(__file__).resolve().parent / "recorded" / "flash_attention_cpu.json"


def three_calls(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scores, softmax, weighted sum."""
    scores = (q / math.sqrt(q.shape[1])) @ k.T
    weights = torch.softmax(scores, dim=-1)
    return weights @ v


def tiled_loop(q: Tensor, k: Tensor, v: Tensor, tile: int) -> Tensor:
    """The same in tiles of `tile` queries and keys, with a running maximum and sum."""
    out = torch.empty_like(q)
    for i in range(0, len(q), tile):
        q_tile = q[i : i + tile] / math.sqrt(q.shape[1])
        row_max = torch.full((len(q_tile), 1), -math.inf)
        row_sum, acc = torch.zeros_like(row_max), torch.zeros_like(q_tile)
        for j in range(0, len(k), tile):
            scores = q_tile @ k[j : j + tile].T
            new_max = torch.maximum(row_max, scores.amax(dim=1, keepdim=True))
            weights = (scores - new_max).exp_()
            rescale = (row_max - new_max).exp()
            row_sum = row_sum * rescale + weights.sum(dim=1, keepdim=True)
            acc = acc * rescale + weights @ v[j : j + tile]
            row_max = new_max
        out[i : i + tile] = acc / row_sum
    return out


def measure(repeats: int) -> dict[str, dict[str, float]]:
    """Seconds by name: the median and the best."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(TOKENS, HEAD_DIM, generator=generator) for _ in range(3))
    scores, weights = torch.zeros(TOKENS, TOKENS), torch.zeros(TOKENS, TOKENS)

    def into_buffers() -> Tensor:
        torch.mm(q / math.sqrt(HEAD_DIM), k.T, out=scores)
        torch.softmax(scores, dim=-1, out=weights)
        return weights @ v

    ways = {"three calls": lambda: three_calls(q, k, v), "into buffers": into_buffers}
    ways |= {f"tile {t}": lambda t=t: tiled_loop(q, k, v, t) for t in TILES}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    # One round at a time, so that the best round can be kept beside the median.
    time_interleaved(ways, repeats=1, warmup=0)
    for _ in range(repeats):
        for name, timing in time_interleaved(ways, repeats=1, warmup=0).items():
            seconds[name].append(timing.median)
    return {
        name: {"median": sorted(all_of)[len(all_of) // 2], "best": min(all_of)}
        for name, all_of in seconds.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="The CPU curve of chapter 08.")
    parser.add_argument("--json", type=Path, default=RECORDED)
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    facts = environment(torch.device("cpu"))
    facts["device"] += ", 1 thread"
    document = {
        "environment": facts,
        "tokens": TOKENS,
        "head_dim": HEAD_DIM,
        "dtype": "float32",
        "repeats": options.repeats,
        "seconds": measure(options.repeats),
    }
    options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(document, indent=1))


if __name__ == "__main__":
    main()
