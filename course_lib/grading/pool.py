"""The local engine: a pool of worker processes, each with a judge and its sandbox.

An engine takes tasks and gives outcomes, in any order; it decides nothing about grades. A worker
that dies, hangs or stumbles is replaced, and its submission tried once more in a fresh one.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any

from course_lib.grading.result import ExerciseResult
from course_lib.grading.submission import Submission

LONGEST = 1800.0
"""Seconds after which a worker is taken to hang. The judge's own limits end all code before."""
STARTING = 300.0
"""Seconds, on top of that, that a worker has to start its judge."""
TRIES = 2
PATIENCE = 10.0
"""Seconds that a worker has to close its sandbox before it is killed."""


class StartError(RuntimeError):
    """No judge could be started here. The message says why, and what would help."""


@dataclass(frozen=True)
class Task:
    """One submission to judge, of the chapter with this package name."""

    submission: Submission
    chapter: str


@dataclass(frozen=True)
class Outcome:
    """What became of a task: how it was judged, or why the grader failed.

    Attributes:
        task: The task.
        exercises: What the judge said.
        sandbox: The sandbox's level.
        start: "warm" or "cold".
        seconds: From taking it up to having it.
        spent: Of these, the judge's split.
        notes: What the judge says of the file's cells.
        failure: Why there is no verdict, or "".
    """

    task: Task
    exercises: tuple[ExerciseResult, ...] = ()
    sandbox: str = ""
    start: str = ""
    seconds: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    failure: str = ""


MakeJudge = Callable[[], Any]
"""Makes a judge, in the worker: a module-level function, or a partial of one. A judge is a context
manager with `grade(submission, chapter)`, `sandbox_level` and `start`."""


def local_engine(
    device: str, allow_weak: bool, secret_seed: bytes, jobs: int | None = None
) -> Callable[[Iterator[Task]], Iterator[Outcome]]:
    """The engine that `course grade` uses: `run` with a `Judge` in each worker.

    Args:
        device: "cpu" or "cuda".
        allow_weak: Whether a weak sandbox will do.
        secret_seed: For the cases.
        jobs: How many workers; default: one for each core that this process may use.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    make = functools.partial(_judge, device, allow_weak, secret_seed)
    return functools.partial(run, make_judge=make, jobs=jobs or cores or 1)


def _judge(device: str, allow_weak: bool, secret_seed: bytes) -> Any:
    # Imported in the worker: this process need not have torch to start it.
    from course_lib.grading.judge import Judge

    return Judge(device=device, allow_weak=allow_weak, secret_seed=secret_seed)


def run(
    tasks: Iterator[Task], make_judge: MakeJudge, jobs: int, *, longest: float = LONGEST
) -> Iterator[Outcome]:
    """Judge tasks in a pool of processes.

    A task is taken only when a worker is free for it. All workers have ended when this returns,
    also when the caller stops early.

    Args:
        tasks: What to judge.
        make_judge: Gives a judge.
        jobs: How many workers at most.
        longest: Seconds for one task before its worker is killed.

    Raises:
        StartError: If the first judge cannot be started.
    """
    # The first one starts while the first submission is still being looked for.
    workers = [_Worker(make_judge)]
    waiting = ((task, 1) for task in tasks)
    again: list[tuple[Task, int]] = []
    proven = False
    try:
        while True:
            while any(worker.task is None for worker in workers) or len(workers) < jobs:
                item = again.pop() if again else next(waiting, None)
                if item is None:
                    break
                idle = [worker for worker in workers if worker.task is None]
                if not idle:
                    workers.append(_Worker(make_judge))
                (idle or workers)[-1].give(*item, longest)
            busy = [worker for worker in workers if worker.task is not None]
            if not busy:
                return
            _wait(busy)
            for worker in busy:
                for kind, content in worker.heard():
                    if kind == "ready":
                        proven = worker.ready = True
                        worker.until = time.monotonic() + longest
                        continue
                    if kind == "unfit" and not proven:
                        raise StartError(content)
                    task, tries = worker.done()
                    if kind == "verdict":
                        yield Outcome(task, **content)
                        continue
                    # It died, hung or stumbled: its judge is not to be trusted any more.
                    workers.remove(worker)
                    worker.end(at_once=True)
                    if tries < TRIES:
                        again.append((task, tries + 1))
                    elif not proven:
                        raise StartError(content)
                    else:
                        yield Outcome(task, failure=content)
                    break
    finally:
        for worker in workers:
            worker.leave()
        for worker in workers:
            worker.end(at_once=worker.task is not None or not worker.ready)


class _Worker:
    """One process, seen from here."""

    def __init__(self, make_judge: MakeJudge) -> None:
        # A fresh interpreter: a fork would copy the threads' locks of this one.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, make_judge), daemon=False)
        self.process.start()
        theirs.close()
        self.task: Task | None = None
        self.tries = 0
        self.until = 0.0
        self.ready = False

    def give(self, task: Task, tries: int, longest: float) -> None:
        """Hand it a task."""
        starting = 0.0 if self.ready else STARTING
        self.task, self.tries = task, tries
        self.until = time.monotonic() + longest + starting
        # Where it is dead already, `heard` says so.
        with contextlib.suppress(OSError):
            self.connection.send(task)

    def done(self) -> tuple[Task, int]:
        """Its task, and how often it was tried; it has none any more."""
        assert self.task is not None
        task, self.task = self.task, None
        return task, self.tries

    def heard(self) -> Iterator[tuple[str, Any]]:
        """What it said since, as (kind, content); at last that it is dead or hangs."""
        # Asked first: what it said before it died can then still be heard.
        alive = self.process.is_alive()
        try:
            while self.connection.poll():
                yield self.connection.recv()
        except (EOFError, OSError):
            self.process.join(PATIENCE)
            alive = False
        if self.task is None:
            return
        if not alive:
            yield "dead", f"The grader's worker died ({_exit(self.process.exitcode)})."
        elif time.monotonic() > self.until:
            yield "dead", "The grader's worker did not answer any more."

    def leave(self) -> None:
        """Ask it to close its sandbox and end."""
        with contextlib.suppress(OSError):
            self.connection.send(None)

    def end(self, *, at_once: bool = False) -> None:
        """See that it is gone: it and what it started."""
        self.process.join(0 if at_once else PATIENCE)
        if self.process.is_alive():
            # It first asks politely, so that the judge can take down its sandbox.
            self.process.terminate()
            self.process.join(PATIENCE)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.connection.close()
        self.process.close()


def _wait(busy: list[_Worker]) -> None:
    """Wait until one of them says something, dies, or has had its time."""
    things = [thing for each in busy for thing in (each.connection, each.process.sentinel)]
    until = min(worker.until for worker in busy)
    wait(things, timeout=max(0.0, until - time.monotonic()) + 0.01)


def _exit(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    return f"signal {signal.Signals(-code).name}"


# In the worker.


def _work(connection: Connection, make_judge: MakeJudge) -> None:
    """A worker's life: until there is no more to judge, or the parent is gone."""
    # Ctrl-C is the parent's to handle: it ends the workers in order.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)
    if hasattr(os, "setsid"):
        os.setsid()
    try:
        with contextlib.suppress(EOFError, BrokenPipeError), contextlib.ExitStack() as stack:
            _serve(connection, make_judge, stack)
    finally:
        # Nothing is left to take down, and an exception in the interpreter's own end is noise.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _serve(connection: Connection, make_judge: MakeJudge, stack: contextlib.ExitStack) -> None:
    try:
        judge = stack.enter_context(make_judge())
    except Exception as error:
        connection.send(("unfit", str(error) or repr(error)))
        return
    connection.send(("ready", None))
    while (task := connection.recv()) is not None:
        try:
            verdict = _judged(judge, task)
        except Exception as error:
            connection.send(("stumbled", f"The grader stumbled: {_where(error)}"))
            return
        connection.send(("verdict", verdict))


def _judged(judge: Any, task: Task) -> dict[str, Any]:
    start = time.perf_counter()
    judged = judge.grade(task.submission, task.chapter)
    return {
        "exercises": tuple(judged.exercises),
        "sandbox": judge.sandbox_level,
        "start": judge.start,
        "spent": dict(judged.seconds),
        "notes": tuple(judged.notes),
        "seconds": time.perf_counter() - start,
    }


def _where(error: Exception) -> str:
    """An error in one line, with the place that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({os.path.basename(frames[-1].filename)}:{frames[-1].lineno})" if frames else ""
    return f"{type(error).__name__}: {error}{place}"


def _leave(_number: int, _frame: object) -> None:
    # As an exception, so that the judge takes down its sandbox.
    raise SystemExit(1)
