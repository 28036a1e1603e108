"""What the official grade says of one submission, as data.

Two things stand in one JSON file. The *result* is a pure function of the submission's bytes, the
grader, the secret seed and the kind of device: graded again, on any machine and by any engine, it
has the same bytes in canonical JSON and so the same address. The *envelope* around it says whose it
is and how it came about, and is not part of the address:

    {"schema": 1, "submission": "jane/08_flash_attention.ipynb", "student": "jane",
     "sandbox": "bwrap", "start": "warm", "engine": "local", "finished_at": "2026-…Z",
     "seconds": 3.1, "spent": {"overhead": 0.1, "learner": 1.4, "oracle": 1.6},
     "address": "…",
     "result": {"sha256": "…", "chapter": "flash_attention", "status": "graded", "reason": "",
                "notes": [], "score": 31.0, "max_score": 40.0, "exercises": […],
                "grader": "…", "seed_id": "…", "device": "cpu"}}

Reading is strict: a missing or unknown name, a wrong type, a sum or an address that does not hold
is an error that says where.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar

SCHEMA = 1
EXERCISE_STATUSES = ("passed", "failed", "error", "timeout", "memory", "missing", "forbidden")
RESULT_STATUSES = ("graded", "unreadable", "no_chapter")
PARTS = ("overhead", "learner", "oracle")
"""Where the seconds went: the grader's own, the learner's code, the expected values."""

LARGEST_FILE = 32 * 2**20
"""Most bytes in a file of results that is read back."""

_T = TypeVar("_T")


class ResultError(ValueError):
    """A result, or a file of one, breaks its own rules. The message says where and how."""


@dataclass(frozen=True)
class CaseResult:
    """What became of one case. A learner reads it, so it holds no expected value.

    Attributes:
        name: What is special about the case, in the record's words.
        stage: "values", "awkward", "gradients" or "method".
        status: One of `EXERCISE_STATUSES`.
        message: One sentence, or "".
    """

    name: str
    stage: str
    status: str
    message: str = ""

    def __post_init__(self) -> None:
        _texts(self, "name", "stage", "status", "message")
        _one_of(self, "status", EXERCISE_STATUSES)


@dataclass(frozen=True)
class Finding:
    """Something that a person should look at. It costs no points by itself.

    Attributes:
        rule: What was noticed, in one or two words: "library operator", "defined twice".
        message: One sentence.
        where: Cell and line, or the words of the code, or "".
    """

    rule: str
    message: str
    where: str = ""

    def __post_init__(self) -> None:
        _texts(self, "rule", "message", "where")


@dataclass(frozen=True)
class ExerciseResult:
    """What became of one exercise. Points are all or nothing.

    Attributes:
        id: "chapter.name".
        score: The points that were earned: `max_score` where it passed, else 0.
        max_score: The exercise's points.
        status: One of `EXERCISE_STATUSES`.
        stage: Where it ended: "defined", a case's stage, "compiles" or "done".
        feedback: For the learner: one or two sentences.
        cases: In the order in which they were tried.
        findings: For a person to judge.
    """

    id: str
    score: float
    max_score: float
    status: str
    stage: str
    feedback: str
    cases: tuple[CaseResult, ...] = ()
    findings: tuple[Finding, ...] = ()

    def __post_init__(self) -> None:
        _texts(self, "id", "status", "stage", "feedback")
        _one_of(self, "status", EXERCISE_STATUSES)
        _numbers(self, "score", "max_score")
        _tuples(self, cases=CaseResult, findings=Finding)
        earned = self.max_score if self.status == "passed" else 0.0
        if self.score != earned:
            raise ResultError(
                f"score of {self.id} is {self.score}; {self.status!r} earns {earned} of "
                f"{self.max_score} points."
            )


@dataclass(frozen=True)
class Result:
    """The grade of one submission: the same bytes whenever and wherever it is computed.

    Attributes:
        sha256: Of the submission's bytes; "" where they could not be read.
        chapter: The chapter's package name, or "" where it cannot be told.
        status: "graded"; "unreadable" or "no_chapter", where no code was run.
        exercises: Every exercise of the chapter, in the chapter's order.
        grader: Version of the grader and of what it computes with.
        seed_id: Names the secret seed without giving it away.
        device: "cpu" or "cuda".
        reason: Why it is not "graded", or "".
        notes: What the learner should know about the file and its cells.
    """

    sha256: str
    chapter: str
    status: str
    exercises: tuple[ExerciseResult, ...]
    grader: str
    seed_id: str
    device: str
    reason: str = ""
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _texts(self, "sha256", "chapter", "status", "grader", "seed_id", "device", "reason")
        _one_of(self, "status", RESULT_STATUSES)
        _tuples(self, exercises=ExerciseResult, notes=str)
        if self.sha256 and not is_sha256(self.sha256):
            raise ResultError(f"sha256 is {self.sha256!r}; expected 64 hexadecimal digits.")
        if (self.status == "graded") == bool(self.reason):
            raise ResultError(f"reason is {self.reason!r} and status {self.status!r}.")
        if self.status == "graded" and not self.sha256:
            raise ResultError("sha256 is empty, and the submission is graded.")
        ids = [exercise.id for exercise in self.exercises]
        if twice := sorted({each for each in ids if ids.count(each) > 1}):
            raise ResultError(f"exercises has {', '.join(twice)} more than once.")

    @property
    def score(self) -> float:
        """Points earned."""
        return math.fsum(exercise.score for exercise in self.exercises)

    @property
    def max_score(self) -> float:
        """Points that can be earned."""
        return math.fsum(exercise.max_score for exercise in self.exercises)

    @property
    def origin(self) -> tuple[str, ...]:
        """All that decides the result: two results of one origin are the same."""
        return self.sha256, self.chapter, self.status, self.grader, self.seed_id, self.device

    @property
    def address(self) -> str:
        """SHA-256 of the canonical JSON."""
        return hashlib.sha256(canonical(self.as_json())).hexdigest()

    def as_json(self) -> dict[str, Any]:
        """As plain data."""
        data = _plain(self)
        return {**data, "score": self.score, "max_score": self.max_score}

    @classmethod
    def from_json(cls, data: Any) -> Result:
        """Read it back.

        Raises:
            ResultError: If `data` is not exactly what `as_json` gives.
        """
        data = _mapping(cls, data, "result", derived=("score", "max_score"))
        exercises = [
            _exercise(each, f"result.exercises[{i}]")
            for i, each in enumerate(_list(data["exercises"], "result.exercises"))
        ]
        notes = tuple(_list(data["notes"], "result.notes"))
        own = {name: data[name] for name in data if name not in ("score", "max_score")}
        result = _made(cls, {**own, "exercises": tuple(exercises), "notes": notes}, "result")
        for name in ("score", "max_score"):
            if data[name] != getattr(result, name) or isinstance(data[name], bool):
                raise ResultError(
                    f"result.{name} is {data[name]!r}; its exercises add up to "
                    f"{getattr(result, name)!r}."
                )
        return result


@dataclass(frozen=True)
class Graded:
    """One file of results: the result in its envelope.

    Attributes:
        submission: Where the submission was found, relative to what was asked for.
        student: Whose it is.
        result: The grade.
        sandbox: The level that the child ran in: "bwrap" or a weaker one; "none" where no code ran.
        start: "warm" or "cold"; "none" where no code ran; "copied" from another submission with the
            same bytes.
        engine: What ran it: "local".
        seconds: From taking the submission up to having its result.
        spent: Of these, by `PARTS`.
        finished_at: UTC, ISO 8601.
    """

    submission: str
    student: str
    result: Result
    sandbox: str
    start: str
    engine: str
    seconds: float
    spent: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))
    finished_at: str = ""

    def __post_init__(self) -> None:
        _texts(self, "submission", "student", "sandbox", "start", "engine", "finished_at")
        _numbers(self, "seconds")
        if not isinstance(self.result, Result):
            raise ResultError(f"result is a {type(self.result).__name__}; expected a Result.")
        if not isinstance(self.spent, dict) or set(self.spent) != set(PARTS):
            raise ResultError(f"spent is {self.spent!r}; expected {', '.join(PARTS)}.")
        spent = {part: _number(self.spent[part], f"spent[{part!r}]") for part in PARTS}
        object.__setattr__(self, "spent", spent)

    def as_json(self) -> dict[str, Any]:
        """As plain data: the file's content."""
        data = {"schema": SCHEMA, **_plain(self), "address": self.result.address}
        # The result last: a person who opens the file sees whose it is first.
        del data["result"]
        return {**data, "result": self.result.as_json()}

    @classmethod
    def from_json(cls, data: Any) -> Graded:
        """Read it back.

        Raises:
            ResultError: If `data` is not exactly what `as_json` gives.
        """
        if isinstance(data, dict) and data.get("schema") != SCHEMA:
            raise ResultError(f"schema is {data.get('schema')!r}; this grader reads {SCHEMA}.")
        data = _mapping(cls, data, "the file", derived=("schema", "address"))
        own = {name: data[name] for name in data if name not in ("schema", "address")}
        graded = _made(cls, {**own, "result": Result.from_json(data["result"])}, "the file")
        if data["address"] != graded.result.address:
            raise ResultError(
                f"address is {data['address']!r}; the result has {graded.result.address}. "
                "It was changed after it was written."
            )
        return graded


def canonical(data: Any) -> bytes:
    """Plain data as the one JSON text that it has: sorted names, no spaces, ASCII, no NaN."""
    text = json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return text.encode("ascii")


def dumps(graded: Graded) -> str:
    """A file of results, readable by people: the order of names is fixed."""
    return json.dumps(graded.as_json(), indent=1, allow_nan=False) + "\n"


def loads(text: str | bytes) -> Graded:
    """Read a file of results.

    Raises:
        ResultError: If it is not JSON, or not exactly what `dumps` writes.
    """
    if len(text) > LARGEST_FILE:
        raise ResultError(f"it has {len(text):,} bytes; expected at most {LARGEST_FILE:,}.")
    try:
        data = json.loads(text, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise ResultError(f"it is not JSON: {error}") from None
    return Graded.from_json(data)


def is_sha256(text: str) -> bool:
    """Whether a text is a SHA-256 in lower-case hexadecimal."""
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number")


def _plain(value: Any) -> Any:
    """Dataclasses as dicts and tuples as lists, in the order of their fields."""
    if isinstance(value, CaseResult | Finding | ExerciseResult | Result | Graded):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, tuple):
        return [_plain(each) for each in value]
    return dict(value) if isinstance(value, dict) else value


def _exercise(data: Any, where: str) -> ExerciseResult:
    data = _mapping(ExerciseResult, data, where)
    parts: dict[str, type[CaseResult] | type[Finding]] = {"cases": CaseResult, "findings": Finding}
    for name, kind in parts.items():
        data[name] = tuple(
            _made(kind, _mapping(kind, each, f"{where}.{name}[{i}]"), f"{where}.{name}[{i}]")
            for i, each in enumerate(_list(data[name], f"{where}.{name}"))
        )
    return _made(ExerciseResult, data, where)


def _mapping(
    kind: type[Any], data: Any, where: str, derived: tuple[str, ...] = ()
) -> dict[str, Any]:
    """A dict with exactly the names of a dataclass, and those that are computed from them."""
    if not isinstance(data, dict):
        raise ResultError(f"{where} is a {type(data).__name__}; expected an object.")
    names = {each.name for each in fields(kind)} | set(derived)
    for problem, wrong in (("lacks", names - set(data)), ("has an unknown", set(data) - names)):
        if wrong:
            raise ResultError(f"{where} {problem} {', '.join(sorted(map(repr, wrong)))}.")
    return dict(data)


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise ResultError(f"{where} is a {type(data).__name__}; expected a list.")
    return data


def _made(kind: type[_T], data: dict[str, Any], where: str) -> _T:
    try:
        return kind(**data)
    except ResultError as error:
        raise ResultError(f"{where}: {error}") from None


def _texts(record: Any, *names: str) -> None:
    for name in names:
        value = getattr(record, name)
        if type(value) is not str:
            raise ResultError(f"{name} is a {type(value).__name__}; expected text.")


def _one_of(record: Any, name: str, known: tuple[str, ...]) -> None:
    if getattr(record, name) not in known:
        raise ResultError(
            f"{name} is {getattr(record, name)!r}; expected one of {', '.join(known)}."
        )


def _numbers(record: Any, *names: str) -> None:
    for name in names:
        object.__setattr__(record, name, _number(getattr(record, name), name))


def _number(value: Any, name: str) -> float:
    """A number as a float, so that 5 and 5.0 have one text."""
    if type(value) not in (int, float) or not 0 <= value < math.inf:
        raise ResultError(f"{name} is {value!r}; expected a number, 0 or more.")
    return float(value)


def _tuples(record: Any, **kinds: type) -> None:
    """Lists become tuples; every element must be of its kind."""
    for name, kind in kinds.items():
        value = getattr(record, name)
        if not isinstance(value, list | tuple):
            raise ResultError(f"{name} is a {type(value).__name__}; expected a tuple.")
        wrong = [type(each).__name__ for each in value if not isinstance(each, kind)]
        if wrong:
            raise ResultError(f"{name} holds a {wrong[0]}; expected {kind.__name__}.")
        object.__setattr__(record, name, tuple(value))
