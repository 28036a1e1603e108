"""The speed that we want, as ratios of speeds on one device, and how a run stands to them.

A goal names the case it is for: which peer, which direction, which sizes. A ratio is the speed of
ours over the peer's, both in FLOP/s of what each computed, so above 1 ours is faster. Ratios are
given for every peer, good and bad; goals are judged on the device that they were set for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

__all__ = ["GOALS", "Goal", "ratios", "report"]

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Goal:
    """How fast ours should be beside one peer, and for which records that is meant."""

    peer: str
    direction: str
    at_least: float  #: ours ÷ peer
    kind: str = "dense"  #: the first part of a case's name
    head_dim: int | None = None  #: None: any
    causal: bool | None = None  #: None: both
    windowed: bool | None = False  #: None: both
    tokens: int = 0  #: queries of the longest sequence, at least
    stretch: float | None = None  #: what would be more than good

    def is_for(self, record: Record) -> bool:
        """Whether a record of ours is one of those that the goal is about."""
        shape = record["shape"]
        return (
            record["case"].split("/")[0] == self.kind
            and record["direction"] == self.direction
            and record["dtype"] == "bfloat16"
            and self.head_dim in (None, shape["D"])
            and self.causal in (None, record["causal"])
            and self.windowed in (None, record["window_size"] != [-1, -1])
            and shape["Tq"] >= self.tokens
        )


#: The device that the goals were set for, as PyTorch names it.
GOALS_DEVICE = "H200"

#: By op. The first goal that is for a record counts.
GOALS: dict[str, tuple[Goal, ...]] = {
    "flash_attention": (
        Goal("sdpa_cudnn", "forward", 0.82, head_dim=128, causal=False, tokens=4096, stretch=0.90),
        # 4095, one short of a block, counts as 4096.
        Goal("sdpa_cudnn", "forward", 0.75, head_dim=128, causal=True, tokens=4095, stretch=0.85),
        Goal("sdpa_cudnn", "forward", 0.95, head_dim=64),
        Goal("sdpa_flash", "forward", 1.25),
        Goal("sdpa_cudnn", "backward", 0.60, head_dim=128),
        Goal("sdpa_cudnn", "backward", 0.70, head_dim=64),
        Goal("varlen_attn", "forward", 0.75, kind="varlen", windowed=None),
        Goal("varlen_attn", "backward", 0.75, kind="varlen", windowed=None),
        # Time of the packed kernel against that of the dense one, scaled by the pairs of query and
        # key that each computes: what being packed costs.
        Goal("ours_padded", "forward", 0.90, kind="varlen", windowed=None),
        Goal("ours_padded", "backward", 0.90, kind="varlen", windowed=None),
    )
}


def ratios(op: str, ours: str, records: Iterable[Record], device: str) -> list[Record]:
    """Ours beside every peer that was measured on the same case.

    Args:
        op: Whose goals.
        ours: Name of our implementation.
        records: Of one run.
        device: Name of the device they were measured on.

    Returns:
        For each case, direction and peer the ratio, and the goal where there is one; ``met`` is
        None where the device is not the goals' own. A case that ours refused has no ratio, and is
        listed with the reason if some goal is for it.
    """
    records = list(records)
    goals = GOALS.get(op, ())
    judged = []
    for mine in (r for r in records if r["implementation"] == ours):
        place = (mine["case"], mine["direction"])
        for theirs in records:
            if theirs is mine or (theirs["case"], theirs["direction"]) != place:
                continue
            peer = theirs["implementation"]
            goal = next((g for g in goals if g.peer == peer and g.is_for(mine)), None)
            entry: Record = {"case": place[0], "direction": place[1], "peer": peer}
            if "refused" in theirs or ("refused" in mine and goal is None):
                continue
            if "refused" in mine:
                entry["refused"] = mine["refused"]
            else:
                entry["ratio"] = mine["tflops_per_second"] / theirs["tflops_per_second"]
            if goal is not None:
                entry |= {"goal": goal.at_least, "stretch": goal.stretch, "met": None}
                if GOALS_DEVICE in device:
                    entry["met"] = entry.get("ratio", 0.0) >= goal.at_least
            judged.append(entry)
    return judged


def report(judged: list[Record]) -> str:
    """The ratios in words, one line each, and how many goals were met."""
    lines = ["ours ÷ peer, as speeds (above 1: ours is faster)"]
    for entry in judged:
        value = f"{entry['ratio']:6.2f}" if "ratio" in entry else "  none"
        text = f"  {entry['case']:34} {entry['direction']:9} {entry['peer']:15} {value}"
        if "goal" in entry:
            text += f"  goal {entry['goal']:.2f}"
            if entry["met"] is not None:
                stretch = entry["stretch"]
                beyond = stretch is not None and entry.get("ratio", 0.0) >= stretch
                text += (
                    ": met, stretch goal too" if beyond else ": met" if entry["met"] else ": MISSED"
                )
        if "refused" in entry:
            text += f"  (ours refused: {entry['refused']})"
        lines.append(text)
    verdicts = [entry["met"] for entry in judged if entry.get("met") is not None]
    if verdicts:
        lines.append(f"{sum(verdicts)} of {len(verdicts)} goals met.")
    elif any("goal" in entry for entry in judged):
        lines.append(f"The goals were set for an {GOALS_DEVICE}, and are not judged here.")
    return "\n".join(lines)
