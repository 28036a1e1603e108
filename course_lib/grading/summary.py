"""What `course grade` says at its end: a table for people, or data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from course_lib.grading.grade import STRONG, Line, Settings, grader_version
from course_lib.grading.result import SCHEMA, Graded
from course_lib.grading.seed import seed_id


def absent(lines: Iterable[Line], students: dict[str, str]) -> list[str]:
    """Students of the list who handed in nothing, by name."""
    present = {line.source.student for line in lines if line.source.listed}
    return sorted(set(students.values()) - present)


def unlisted(lines: Iterable[Line]) -> list[str]:
    """Submissions that the list of students does not have."""
    return [line.source.name for line in lines if not line.source.listed]


def progress_line(line: Line, count: int, total: int) -> str:
    """One line of a run under way."""
    seconds = line.graded.seconds if line.graded else 0.0
    time = f"  {seconds:.1f} s" if seconds and not line.reused else ""
    return f"[{count:{len(str(total))}}/{total}] {line.source.name}: {_verdict(line)}{time}"


def table(lines: Sequence[Line], settings: Settings, students: dict[str, str] | None) -> str:
    """One row a submission, by student, and what to know about all of them."""
    rows = sorted(lines, key=lambda line: (line.source.student, line.source.name))
    cells = [
        (
            line.source.student,
            line.source.name,
            line.graded.result.chapter if line.graded else "",
            _verdict(line),
        )
        for line in rows
    ]
    cells.insert(0, ("student", "submission", "chapter", "points"))
    widths = [max(len(row[column]) for row in cells) for column in range(3)]
    text = [
        "  ".join([*(f"{row[i]:{widths[i]}}" for i in range(3)), row[3]]).rstrip() for row in cells
    ]
    text += ["", *_sums(lines), f"Results: {settings.out / 'results'}"]
    if students is not None:
        named = {"Handed in nothing": absent(lines, students), "Not listed": unlisted(lines)}
        text += [f"{what}: {', '.join(names)}." for what, names in named.items() if names]
    return "\n".join(text)


def summary(
    lines: Sequence[Line], settings: Settings, students: dict[str, str] | None
) -> dict[str, Any]:
    """The same as data."""
    data: dict[str, Any] = {
        "schema": SCHEMA,
        "out": str(settings.out),
        "grader": grader_version(),
        "seed_id": seed_id(settings.seed),
        "device": settings.device,
        "engine": settings.engine,
        "submissions": [_as_json(line) for line in lines],
        "counts": dict(Counter(map(_status, lines))),
    }
    if students is not None:
        data |= {"absent": absent(lines, students), "unlisted": unlisted(lines)}
    return data


def _as_json(line: Line) -> dict[str, Any]:
    data: dict[str, Any] = {
        "submission": line.source.name,
        "student": line.source.student,
        "status": _status(line),
        "failure": line.failure,
    }
    if line.graded is None:
        return data
    graded, result = line.graded, line.graded.result
    return {
        **data,
        "chapter": result.chapter,
        "reason": result.reason,
        "score": result.score,
        "max_score": result.max_score,
        "findings": _findings(graded),
        "sandbox": graded.sandbox,
        "start": graded.start,
        "seconds": graded.seconds,
        "spent": graded.spent,
        "reused": line.reused,
        "same_as": line.same_as,
        "address": result.address,
        "file": str(line.file),
    }


def _status(line: Line) -> str:
    return line.graded.result.status if line.graded else "failed"


def _findings(graded: Graded) -> int:
    return sum(len(exercise.findings) for exercise in graded.result.exercises)


def _verdict(line: Line) -> str:
    """Points and what is special about them."""
    if line.graded is None:
        return f"THE GRADER FAILED: {line.failure}"
    result = line.graded.result
    words = [f"{result.score:g} of {result.max_score:g}"]
    if result.status != "graded":
        words.append(result.reason)
    if count := _findings(line.graded):
        words.append(f"{count} finding{'s' if count > 1 else ''}")
    if line.same_as:
        words.append(f"the same file as {line.same_as}")
    if line.graded.sandbox not in STRONG:
        words.append(f"sandbox {line.graded.sandbox}")
    return "; ".join(words)


def _sums(lines: Sequence[Line]) -> list[str]:
    counts = Counter(map(_status, lines))
    noun = "submission" if len(lines) == 1 else "submissions"
    words = {"graded": "graded", "unreadable": "unreadable", "no_chapter": "of no known chapter"}
    parts = [f"{counts[status]} {text}" for status, text in words.items() if counts[status]]
    text = [f"{len(lines)} {noun}: {', '.join(parts) or 'none graded'}."]
    if counts["failed"]:
        text.append(
            f"The grader failed on {counts['failed']}. Run the same command again: what is graded "
            "stands."
        )
    weak = {line.graded.sandbox for line in lines if line.graded} - set(STRONG)
    if weak:
        text.append(
            f"Not official: code ran in a weak sandbox ({', '.join(sorted(weak))}), where it may "
            "read files and reach the network."
        )
    return text
