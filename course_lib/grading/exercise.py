"""The record of an exercise.

An exercise is declared once, in `course_lib/<chapter>/exercises/<name>.py`, as a value of
`Exercise`. The card in the notebook, the stub's hints, `check`, the tests of the exercise, the
points and the learner's progress are all made from that one record.

The parts of a record, in the order in which they are used:

    cases(size, seed)  ->  Case(name, data, stage)     plain data: what can be sent to a process
    harness(answer, data)  ->  outputs                  runs the learner's answer on the data
    oracle(data)           ->  outputs                  the truth, in fp64, by another algorithm
    accepts                                             correct answers; they set the tolerance
    misconceptions                                      wrong answers that people really give

An *answer* is whatever the learner defines at top level under the exercise's name: a function, a
class, a host function that launches a kernel, a number, or a letter.
"""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Kind = Literal["function", "kernel", "class", "answer", "choice"]
Size = Literal["small", "large"]
Stage = Literal["values", "awkward", "gradients", "method"]
Data = dict[str, Any]

STAGES: tuple[Stage, ...] = ("values", "awkward", "gradients", "method")


class ShortTraceback:
    """An error whose message says all: IPython shows it without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [f"{type(self).__name__}: {self}"]


class UnknownExerciseError(ShortTraceback, LookupError):
    """No exercise, or no chapter, has the name that was given."""


class CheckUsageError(ShortTraceback, TypeError):
    """`check` was not called as it should be."""


@dataclass(frozen=True)
class Case:
    """One set of inputs.

    Attributes:
        name: What is special about it, in the words of the verdict card
            ("the maximum arrives last").
        data: The inputs by name, in the order of the answer's parameters. Tensors, numbers,
            strings, and lists and dicts of these: nothing that could not cross to another process.
        stage: When it is tried. Stages run in the order of `STAGES`, and the first failure ends
            the check. Only cases of the stage "method" are measured against the budget.
    """

    name: str
    data: Data
    stage: Stage = "values"


def call_with_data(answer: Any, data: Data) -> Any:
    """The default harness: call a function with the data in order; a value is its own output."""
    return answer(*data.values()) if callable(answer) else answer


@dataclass(frozen=True)
class Misconception:
    """A wrong answer that people really give, and what to say to someone who gives it.

    Attributes:
        name: Short and in the field's terms ("sum not rescaled"). It is shown at the third failure.
        wrong: The wrong answer itself: a callable, or a value for kinds "answer" and "choice".
        question: About the guilty line; shown at the second failure. It ends with "?".
        says: "This is what you get when …"; shown at the third failure.
    """

    name: str
    wrong: Any
    question: str
    says: str


def misconception(name: str, *, question: str, says: str) -> Callable[[Any], Misconception]:
    """Turn the wrong function below into a `Misconception`: code and words stand together."""
    return lambda wrong: Misconception(name, wrong, question, says)


@dataclass(frozen=True)
class Budget:
    """What the answer may use on a case of the stage "method": limits as functions of the data.

    Attributes:
        peak_bytes: Most bytes alive at one time in tensors made during the call.
        largest_tensor: Most bytes in any one tensor made during the call.
        bytes_moved: Most bytes that the learner's kernels load and store (guarded interpreter).
        launches: Most kernel launches.
    """

    peak_bytes: Callable[[Data], int] | None = None
    largest_tensor: Callable[[Data], int] | None = None
    bytes_moved: Callable[[Data], int] | None = None
    launches: Callable[[Data], int] | None = None


@dataclass(frozen=True)
class Exercise:
    """One exercise. See the module's docstring for how its parts work together.

    Attributes:
        id: "chapter.name"; the name is the top-level name that the learner defines.
        kind: What the answer is. A "kernel" is a host function that launches the learner's kernel.
        title: The card's heading.
        task: What to do, in two or three sentences of Markdown. The signature stands in the stub.
        why: One sentence: what the learner can do afterwards that they could not do before.
        points: All or nothing.
        minutes: Measured with readers who had only the notebooks.
        difficulty: 1 to 5.
        core: Core exercises carry the chapter; the others are stretch.
        cases: `cases(size, seed)` yields `Case`s, the smallest first.
        oracle: `oracle(data)` gives the outputs in fp64. Another algorithm than the answers'.
        accepts: Two or more correct answers in different styles. Four times their worst error is
            the tolerance; the first also fixes the outputs' structure, shapes and dtypes.
        misconceptions: Six or more wrong answers (two or more for numbers and letters).
        hints: Three rungs: where to re-read and the case at pencil size; an invariant to print;
            the skeleton with blanks. The fourth rung, the staff version, comes from `solutions/`.
        harness: `harness(answer, data)` runs the answer and returns plain outputs. A module-level
            function that imports what it needs in its own body, since it also runs in a process
            that has nothing else of this file.
        budget: Limits on memory, traffic and launches; by default there are none.
        forbids: Operators that the answer must not call ("aten::_softmax").
        choices: For kind "choice": the letter and its text.
        outputs: Names of the outputs where the answer returns several, for messages.
        unlocks: Names of exercises of the same chapter that build on this one.
        usual_failures: For the assistant at a learner's side: what goes wrong most.
    """

    id: str
    kind: Kind
    title: str
    task: str
    why: str
    points: int
    minutes: int
    difficulty: int
    core: bool
    cases: Callable[[Size, int], Iterable[Case]]
    oracle: Callable[[Data], Any]
    accepts: tuple[Any, ...]
    misconceptions: tuple[Misconception, ...]
    hints: tuple[str, str, str]
    harness: Callable[[Any, Data], Any] = call_with_data
    budget: Budget = field(default_factory=Budget)
    forbids: tuple[str, ...] = ()
    choices: dict[str, str] = field(default_factory=dict)
    outputs: tuple[str, ...] = ()
    unlocks: tuple[str, ...] = ()
    usual_failures: tuple[str, ...] = ()

    @property
    def chapter(self) -> str:
        """The chapter's package name, such as "flash_attention"."""
        return self.id.split(".")[0]

    @property
    def name(self) -> str:
        """The top-level name that the learner defines, such as "online_softmax"."""
        return self.id.split(".")[1]


@dataclass(frozen=True)
class Chapter:
    """A chapter as `course_lib/<package>/exercises/__init__.py` declares it.

    Attributes:
        slug: "08_flash_attention": the name of its files.
        title: The question that the chapter answers.
        exercises: In the order in which they are met.
    """

    slug: str
    title: str
    exercises: Sequence[Exercise]

    @property
    def package(self) -> str:
        """The slug without its number: "flash_attention"."""
        return self.slug.split("_", 1)[1]


def chapters() -> list[Chapter]:
    """Every chapter that is installed, in the order of their numbers."""
    import course_lib

    found = []
    for module in pkgutil.iter_modules(course_lib.__path__):
        name = f"course_lib.{module.name}.exercises"
        spec = importlib.util.find_spec(name) if module.ispkg else None
        # A folder without an __init__ has no origin: it is not a chapter's exercises yet.
        if spec is not None and spec.origin is not None:
            found.append(importlib.import_module(name).CHAPTER)
    return sorted(found, key=lambda chapter: chapter.slug)


def chapter_of(package: str) -> Chapter:
    """The chapter with this package name, such as "flash_attention".

    Raises:
        UnknownExerciseError: If there is none; the message lists those there are.
    """
    name = f"course_lib.{package}.exercises"
    is_package = package.isidentifier() and importlib.util.find_spec(f"course_lib.{package}")
    if is_package and importlib.util.find_spec(name) is not None:
        return importlib.import_module(name).CHAPTER
    known = ", ".join(repr(chapter.package) for chapter in chapters())
    raise UnknownExerciseError(f"There is no chapter {package!r}. The chapters are {known}.")


def exercises_of(package: str) -> list[Exercise]:
    """The exercises of one chapter, in the order in which they are met."""
    return list(chapter_of(package).exercises)


def find_exercise(name: str, chapter: str | None = None) -> Exercise:
    """The exercise called `name`: "chapter.name", or the bare name.

    Args:
        name: The name, with or without its chapter.
        chapter: Where a bare name is looked for first (the chapter that `setup` named).

    Raises:
        UnknownExerciseError: If no exercise has this name, or several chapters have one.
    """
    if chapter is not None:
        for exercise in exercises_of(chapter):
            if name in (exercise.id, exercise.name):
                return exercise
    every = [exercise for each in chapters() for exercise in each.exercises]
    matches = [exercise for exercise in every if name in (exercise.id, exercise.name)]
    if len(matches) == 1:
        return matches[0]
    if matches:
        ids = ", ".join(exercise.id for exercise in matches)
        raise UnknownExerciseError(f"Several exercises are called {name!r}: {ids}. Say which one.")
    here = [exercise.name for exercise in every if chapter in (None, exercise.chapter)]
    close = difflib.get_close_matches(name, here, n=1)
    advice = f"Did you mean {close[0]!r}?" if close else f"There are: {', '.join(here)}."
    raise UnknownExerciseError(f"No exercise is called {name!r}. {advice}")
