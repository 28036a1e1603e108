"""The learner's progress as a card, as text, and as data for `course progress --json`."""

from __future__ import annotations

import time
from typing import Any

from course_lib.grading import progress as store
from course_lib.grading.exercise import chapters
from course_lib.notebook.cards import Card

SIGNS = {"passed": "✓", "failed": "✗", "todo": "○", "new": "○"}
# A notebook that is not trusted yet loses its styles. Then these separators keep words apart; with
# styles, columns do, and the separators are hidden.
STYLE = "<style>.course-progress .course-apart { display: none; }</style>"
COLON, COMMA, DOT = (f"<span class='course-apart'>{sign} </span>" for sign in (":", ",", " ·"))

WORDS = {"passed": "passed", "failed": "not yet", "todo": "begun", "new": "to do"}


def progress() -> Card:
    """Every chapter and every point, and what to do next. Jupyter shows it as a card."""
    data = progress_data()
    return Card(_text(data), _html(data))


def progress_data() -> dict[str, Any]:
    """The learner's progress as plain data.

    Returns:
        `points` and `max_points`; `chapters`, each with its `exercises` (status "new", "todo",
        "failed" or "passed"; `minutes` is the card's, `minutes_spent` the learner's); `next`, the
        id of the exercise to do next, or None; `review_due`, how many recall questions are due;
        `store`, where the record is kept.
    """
    from course_lib.notebook.review import review_times

    standings = store.standings()
    listed = []
    for chapter in chapters():
        rows = []
        for exercise in chapter.exercises:
            standing = standings.get(exercise.id, store.Standing())
            rows.append(
                {
                    "id": exercise.id,
                    "title": exercise.title,
                    "status": standing.status,
                    "points": exercise.points if standing.status == "passed" else 0,
                    "max_points": exercise.points,
                    "core": exercise.core,
                    "difficulty": exercise.difficulty,
                    "minutes": exercise.minutes,
                    "minutes_spent": round(standing.minutes, 1),
                    "attempts": standing.attempts,
                }
            )
        listed.append(
            {
                "slug": chapter.slug,
                "title": chapter.title,
                "points": sum(row["points"] for row in rows),
                "max_points": sum(row["max_points"] for row in rows),
                "exercises": rows,
            }
        )
    now = time.time()
    return {
        "points": sum(chapter["points"] for chapter in listed),
        "max_points": sum(chapter["max_points"] for chapter in listed),
        "chapters": listed,
        "next": _next(listed, standings),
        "review_due": sum(due <= now for due, _ in review_times()),
        "store": str(store.store_path()),
    }


def _next(listed: list[dict[str, Any]], standings: dict[str, store.Standing]) -> str | None:
    """What to do next: the chapter last worked in, core before stretch, else the course in order.

    A core exercise that resists does not hold up the rest: after twice its minutes the next one
    is suggested.
    """
    open_ones = [row for chapter in listed for row in chapter["exercises"] if not row["points"]]
    recent = max(standings, key=lambda id_: standings[id_].last_at or 0.0, default="")
    here = recent.split(".")[0]

    def rank(row: dict[str, Any]) -> tuple[bool, bool, bool]:
        resists = row["minutes_spent"] >= 2 * row["minutes"]
        return (resists, not row["core"], row["id"].split(".")[0] != here)

    return min(open_ones, key=rank)["id"] if open_ones else None


def _number(slug: str) -> str:
    return slug.split("_", 1)[0]


def _text(data: dict[str, Any]) -> str:
    lines = [f"Progress: {data['points']} of {data['max_points']} points"]
    for chapter in data["chapters"]:
        lines.append(
            f"{_number(chapter['slug'])} {chapter['title']}  "
            f"{chapter['points']} of {chapter['max_points']} points"
        )
        for row in chapter["exercises"]:
            lines.append(f"   {SIGNS[row['status']]} {_row_text(row)}")
    return "\n".join([*lines, *_next_lines(data)])


def _row_text(row: dict[str, Any]) -> str:
    kind = "core" if row["core"] else "stretch"
    points = f"{row['points']} of {row['max_points']} points"
    return f"{row['title']}: {WORDS[row['status']]}, {points}, {row['minutes']} min, {kind}"


def _next_lines(data: dict[str, Any]) -> list[str]:
    lines = []
    if data["next"]:
        for chapter in data["chapters"]:
            for row in chapter["exercises"]:
                if row["id"] == data["next"]:
                    lines.append(
                        f"Next: {row['title']} (chapter {_number(chapter['slug'])}, "
                        f"{row['minutes']} {'minute' if row['minutes'] == 1 else 'minutes'})."
                    )
    elif data["chapters"]:
        lines.append("Every exercise has passed.")
    if data["review_due"]:
        noun = "question is" if data["review_due"] == 1 else "questions are"
        lines.append(f"{data['review_due']} {noun} due: course review.")
    return lines


def _html(data: dict[str, Any]) -> str:
    from html import escape

    from course_lib.notebook.cards import header, section

    parts = [header("Progress", aside=f"{data['points']} of {data['max_points']} points")]
    next_chapter = (data["next"] or "").split(".")[0]
    for chapter in data["chapters"]:
        share = chapter["points"] / chapter["max_points"] if chapter["max_points"] else 0.0
        rows = "".join(
            f"<span class='course-{row['status']}'><span aria-hidden='true'>"
            f"{SIGNS[row['status']]}</span> {WORDS[row['status']]}{COLON}</span>"
            f"<span>{escape(row['title'])}{COMMA}</span>"
            f"<span class='course-quiet'>{row['points']} of {row['max_points']}"
            f"<span class='course-apart'> points, </span></span>"
            f"<span class='course-quiet'>{row['minutes']} min, "
            f"{'core' if row['core'] else 'stretch'}<span class='course-apart'><br></span></span>"
            for row in chapter["exercises"]
        )
        opened = " open" if chapter["slug"].split("_", 1)[1] == next_chapter else ""
        passed = sum(row["status"] == "passed" for row in chapter["exercises"])
        parts.append(
            f"<div class='course-chapter'><div><b>{_number(chapter['slug'])}</b> "
            f"<span>{escape(chapter['title'])}{DOT}</span><span class='course-aside'>"
            f"{chapter['points']} of {chapter['max_points']} points</span></div>"
            f"<div class='course-bar' aria-hidden='true'>"
            f"<div style='width:{100 * share:.0f}%'></div></div>"
            f"<details{opened}><summary>{passed} of {len(chapter['exercises'])} exercises passed"
            f"</summary><div class='course-exercises'>{rows}</div></details></div>"
        )
    parts += [f"<p>{escape(line)}</p>" for line in _next_lines(data)]
    return STYLE + section("progress", *parts)
