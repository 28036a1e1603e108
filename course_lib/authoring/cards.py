"""What a notebook says about an exercise, as pure Markdown, made from the exercise's record."""

from __future__ import annotations

import re
from collections.abc import Sequence
from urllib.parse import quote

from course_lib.grading.exercise import Exercise

KINDS = {
    "function": "write a function",
    "kernel": "write a kernel",
    "class": "write a class",
    "answer": "predict a number",
    "choice": "choose and justify",
}


def card_markdown(exercise: Exercise, number: int | None = None) -> str:
    """The card above the learner's cell.

    Args:
        exercise: The record.
        number: Its place in the chapter, counted from 1.
    """
    place = f"Exercise {number}" if number is not None else "Exercise"
    facts = [
        f"**{place}, {_path(exercise)}**",
        f"{KINDS[exercise.kind]}: `{exercise.name}`",
        _plural(exercise.points, "point"),
        f"about {exercise.minutes} minutes",
        _difficulty(exercise),
    ]
    parts = [f"## {exercise.title}", " · ".join(facts), exercise.task.strip()]
    if exercise.choices:
        parts.append("\n".join(f"- **{key}** {text}" for key, text in exercise.choices.items()))
    parts.append(f"*Why:* {exercise.why.strip()}")
    if exercise.unlocks:
        parts.append(f"*Unlocks:* {', '.join(f'`{name}`' for name in exercise.unlocks)}")
    return "\n\n".join(parts)


def list_markdown(exercises: Sequence[Exercise], notebook: str) -> str:
    """The chapter's list of exercises, core before stretch.

    Args:
        exercises: The chapter's records in order.
        notebook: Path of the exercise notebook, relative to the chapter's.
    """
    parts: list[str] = []
    titles = {exercise.name: exercise.title for exercise in exercises}
    for core, heading in ((True, "Core"), (False, "Stretch")):
        group = [(n, e) for n, e in enumerate(exercises, start=1) if e.core is core]
        if not group:
            continue
        minutes = sum(exercise.minutes for _, exercise in group)
        points = sum(exercise.points for _, exercise in group)
        parts.append(
            f"**{heading}**: {_plural(len(group), 'exercise')}, about {minutes} minutes, "
            f"{_plural(points, 'point')}"
        )
        for number, exercise in group:
            facts = [
                KINDS[exercise.kind],
                f"{exercise.minutes} min",
                _plural(exercise.points, "point"),
                _difficulty(exercise),
            ]
            link = f"{notebook}#{anchor(exercise.title)}"
            text = f"{number}. **[{exercise.title}]({link})**: {' · '.join(facts)}  \n"
            text += f"   {exercise.why.strip()}"
            if exercise.unlocks:
                names = ", ".join(titles.get(name, name) for name in exercise.unlocks)
                text += f" *Unlocks:* {names}."
            parts.append(text)
    return "\n\n".join(parts)


def anchor(title: str) -> str:
    """The fragment that a heading gets: its text with dashes for spaces."""
    plain = re.sub(r"[`*]", "", title)
    return quote(plain.replace(" ", "-"))


def _path(exercise: Exercise) -> str:
    return "core" if exercise.core else "stretch"


def _difficulty(exercise: Exercise) -> str:
    dots = "●" * exercise.difficulty + "○" * (5 - exercise.difficulty)
    return f"difficulty {dots} ({exercise.difficulty} of 5)"


def _plural(count: int, noun: str) -> str:
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"
