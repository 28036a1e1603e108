"""The command `course`: the roof of the house. Each verb hands over to the part that does it.

Nothing heavy is imported before a verb needs it, so that `course --help` answers at once.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from course_lib._version import __version__


class UsageError(Exception):
    """The arguments cannot be used. The message names which one and why; the exit code is 2."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: The arguments after the command's name; default: those of the process.

    Returns:
        The exit code: 0; 1 where something that was asked for failed; 2 for unusable arguments.
    """
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and arguments.verb not in ("test", "bench"):
        parser.error(f"{arguments.verb or 'course'} does not know {' '.join(rest)}")
    if arguments.verb is None:
        parser.print_help()
        return 2
    arguments.rest = rest
    try:
        return arguments.run(arguments)
    except UsageError as error:
        print(f"course {arguments.verb}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output left, as `course progress | head` does.
        sys.stderr.close()
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="course", description="From Threshold to FlashAttention: learn, test, build."
    )
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(dest="verb", metavar="VERB")

    lab = verbs.add_parser("lab", help="open JupyterLab on your own copy of the notebooks")
    lab.add_argument("--no-browser", action="store_true", help="print the address only")
    lab.add_argument("--port", type=_port, help="default: the first free one from 8888 on")
    lab.set_defaults(run=_lab)

    update = verbs.add_parser("update", help="bring a new release beside your answers")
    update.set_defaults(run=_update)

    check = verbs.add_parser("check", help="run the checks of an exercise notebook")
    check.add_argument("notebook", type=Path, metavar="NOTEBOOK")
    check.set_defaults(run=_check)

    grade = verbs.add_parser(
        "grade", help="the official grade of a notebook, a folder, a zip: a whole class"
    )
    grade.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    grade.add_argument(
        "--out", type=Path, default=Path("grades"), metavar="DIR", help="default: grades"
    )
    grade.add_argument("--chapter", metavar="SLUG", help="default: what each notebook says")
    grade.add_argument(
        "--students", type=Path, metavar="CSV", help="columns submission and student"
    )
    grade.add_argument("--engine", choices=["local"], default="local", help="default: local")
    grade.add_argument("--jobs", type=_count, metavar="N", help="default: one a core")
    grade.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="default: cpu")
    grade.add_argument("--seed-file", type=Path, metavar="F", help="the seed of another folder")
    grade.add_argument("--again", action="store_true", help="also what has a result already")
    grade.add_argument(
        "--allow-weak-sandbox",
        action="store_true",
        help="grade without a strong sandbox: a self-check, for code that you trust",
    )
    grade.add_argument("--json", action="store_true", help="the summary as data")
    grade.set_defaults(run=_grade)

    progress = verbs.add_parser("progress", help="every chapter and every point")
    progress.add_argument("--json", action="store_true", help="as data")
    progress.set_defaults(run=_progress)

    review = verbs.add_parser("review", help="recall questions that are due today")
    review.set_defaults(run=_review)

    doctor = verbs.add_parser("doctor", help="what this machine can do, and what is missing")
    doctor.add_argument("--json", action="store_true", help="as data")
    doctor.set_defaults(run=_doctor)

    test = verbs.add_parser(
        "test",
        help="every check that CI runs; other arguments go to pytest, and then only pytest runs",
        usage="course test [--fast] [--deep] [PYTEST ARGS]",
    )
    test.add_argument("--fast", action="store_true", help="without notebooks and browser")
    test.add_argument("--deep", action="store_true", help="with the heavy variants")
    test.set_defaults(run=_test)

    build = verbs.add_parser("build", help="masters to notebooks")
    build.add_argument("slugs", nargs="*", metavar="SLUG", help="default: every stale one")
    build.add_argument("--check", action="store_true", help="only say what is stale")
    build.set_defaults(run=_build)

    bench = verbs.add_parser("bench", help="measure the kernels on this machine")
    bench.add_argument("ops", nargs="*", metavar="OP", help="default: all")
    bench.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    bench.add_argument("--compare", type=Path, metavar="FILE", help="with an earlier --json file")
    bench.set_defaults(run=_bench)

    new = verbs.add_parser("new-chapter", help="scaffold all files of a chapter")
    new.add_argument("slug", metavar="SLUG", help="such as 03_receptive_field")
    new.set_defaults(run=_new_chapter)

    version = verbs.add_parser("version", help="which release this is")
    version.set_defaults(run=_version)
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port; expected 1 to 65535")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 1024:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of workers; expected 1 to 1024")
    return int(text)


def _lab(arguments: argparse.Namespace) -> int:
    from course_lib.notebook.lab_server import ServerError, serve
    from course_lib.notebook.workspace import START, WorkspaceError, lay_out, workspace

    work = workspace()
    try:
        new = lay_out(work)
        if new:
            print(f"Copied {len(new)} notebooks to {work}. They are yours to edit.")
        return serve(work, START, port=arguments.port, browser=not arguments.no_browser)
    except ServerError as error:
        if "--port" in str(error):
            raise UsageError(str(error)) from None
        print(f"course lab: {error}", file=sys.stderr)
        return 1
    except WorkspaceError as error:
        print(f"course lab: {error}", file=sys.stderr)
        return 1


def _update(arguments: argparse.Namespace) -> int:
    from course_lib.notebook.workspace import WorkspaceError, update, workspace

    work = workspace()
    words = {
        "new": "new",
        "refreshed": "refreshed (you had not edited it)",
        "beside": "yours is kept; the new one is",
        "already beside": "yours is kept; the new one is",
    }
    try:
        changes = [change for change in update(work) if change.what in words]
    except WorkspaceError as error:
        print(f"course update: {error}", file=sys.stderr)
        return 1
    for change in changes:
        cells = "" if not change.cells else f", {change.cells} cells differ"
        beside = f" {change.beside}" if change.beside else ""
        print(f"{change.name}: {words[change.what]}{beside}{cells}")
    if not changes:
        print(f"Nothing new. Your copy in {work} is of this release.")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from course_lib.notebook.run_checks import UnreadableNotebookError, run_checks, table

    path: Path = arguments.notebook
    if not path.is_file():
        raise UsageError(f"there is no file {path}")
    try:
        report = run_checks(path)
    except UnreadableNotebookError as error:
        raise UsageError(str(error)) from None
    print(table(report))
    return report.exit_code


def _grade(arguments: argparse.Namespace) -> int:
    from course_lib.grading.exercise import UnknownExerciseError, chapter_of
    from course_lib.grading.grade import GradeError, Line, Settings, grade
    from course_lib.grading.pool import StartError, local_engine
    from course_lib.grading.seed import SeedError, folders_seed
    from course_lib.grading.sources import PathsError, find_submissions, read_students
    from course_lib.grading.summary import progress_line, summary, table

    out: Path = arguments.out
    if arguments.device == "cuda":
        _need_gpu()
    try:
        chapter = chapter_of(_package(arguments.chapter)) if arguments.chapter else None
        students = read_students(arguments.students) if arguments.students else None
        sources = find_submissions(arguments.paths, students)
        out.mkdir(parents=True, exist_ok=True)
        seed = folders_seed(out, arguments.seed_file)
    except (UnknownExerciseError, PathsError, SeedError) as error:
        raise UsageError(str(error)) from None
    except OSError as error:
        raise UsageError(f"--out {out}: {error.strerror}") from None
    settings = Settings(
        out=out,
        seed=seed,
        device=arguments.device,
        chapter=chapter,
        allow_weak=arguments.allow_weak_sandbox,
        again=arguments.again,
        engine=arguments.engine,
    )
    engine = local_engine(settings.device, settings.allow_weak, seed, arguments.jobs)

    def tell(line: Line, count: int) -> None:
        print(progress_line(line, count, len(sources)), file=sys.stderr, flush=True)

    try:
        lines = grade(sources, settings, engine, tell)
    except StartError as error:
        hint = "" if settings.allow_weak else " A self-check can do without: --allow-weak-sandbox."
        raise UsageError(f"{error}{hint}") from None
    except GradeError as error:
        print(f"course grade: {error}", file=sys.stderr)
        return 3
    if arguments.json:
        print(json.dumps(summary(lines, settings, students), indent=1, ensure_ascii=False))
    else:
        print(table(lines, settings, students))
    return 3 if any(line.failure for line in lines) else 0


def _package(slug: str) -> str:
    """A chapter's package name; "08_flash_attention" is as good as "flash_attention"."""
    number, _, rest = slug.partition("_")
    return rest if number.isdigit() and rest else slug


def _progress(arguments: argparse.Namespace) -> int:
    from course_lib.notebook.progress_card import progress, progress_data

    if arguments.json:
        print(json.dumps(progress_data(), indent=1, ensure_ascii=False))
    else:
        print(progress())
    return 0


def _review(arguments: argparse.Namespace) -> int:
    from course_lib.notebook.review import review

    return review()


def _doctor(arguments: argparse.Namespace) -> int:
    from course_lib.notebook import doctor

    findings = doctor.examine()
    report = doctor.as_json(findings)
    print(
        json.dumps(report, indent=1, ensure_ascii=False)
        if arguments.json
        else doctor.as_text(findings)
    )
    return 0 if report["ready"] else 1


def _test(arguments: argparse.Namespace) -> int:
    from course_lib.authoring.stages import plan, run

    root = _repository()
    fast, deep = arguments.fast, arguments.deep
    return run(plan(root, fast=fast, deep=deep, args=arguments.rest))


def _build(arguments: argparse.Namespace) -> int:
    root = _repository()
    _need("jupytext", "nbclient")
    from course_lib.authoring.build import main as build

    return build(root, arguments.slugs, arguments.check)


def _bench(arguments: argparse.Namespace) -> int:
    root = _repository()
    from course_lib.authoring.bench import BenchError, bench

    try:
        return bench(root, arguments.ops, arguments.json, arguments.compare, arguments.rest)
    except BenchError as error:
        raise UsageError(str(error)) from None


def _new_chapter(arguments: argparse.Namespace) -> int:
    root = _repository()
    _need("jupytext", "nbclient")
    from course_lib.authoring.scaffold import ScaffoldError, new_chapter

    try:
        written = new_chapter(root, arguments.slug)
    except ScaffoldError as error:
        raise UsageError(str(error)) from None
    for path in written:
        print(path.relative_to(root))
    print(f"Next: ./course build {arguments.slug} && ./course test --fast")
    return 0


def _version(arguments: argparse.Namespace) -> int:
    print(__version__)
    return 0


def _repository() -> Path:
    from course_lib.authoring.paths import NoRepositoryError, repository_root

    try:
        return repository_root()
    except NoRepositoryError as error:
        raise UsageError(str(error)) from None


def _need_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise UsageError("--device cuda: torch finds no NVIDIA GPU here")


def _need(*packages: str) -> None:
    from importlib.util import find_spec

    absent = [name for name in packages if find_spec(name) is None]
    if absent:
        raise UsageError(
            f"needs {', '.join(absent)}: pip install -c constraints.txt -e '.[wild,dev]'"
        )


if __name__ == "__main__":
    sys.exit(main())
