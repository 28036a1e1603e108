"""`course check NOTEBOOK`: run a notebook's checks from the shell.

The notebook runs from top to bottom in a fresh kernel, in its own folder, and its file is not
changed. A cell that fails does not stop the rest. What each `check(...)` returned comes back
through a file, so that it does not matter how a verdict is shown.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

CELL_TIMEOUT = 300

# Runs first in the kernel: every verdict is also written down.
_RECORDER = """\
def _course_recorder():
    import json
    import course_lib

    real = course_lib.check

    def check(*answers, **named):
        verdict = real(*answers, **named)
        line = {"id": verdict.exercise.id, "title": verdict.exercise.title,
                "points": verdict.exercise.points, "status": verdict.status,
                "message": verdict.message, "case": verdict.case}
        with open(%r, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\\n")
        return verdict

    course_lib.check = check


_course_recorder()
del _course_recorder
"""


class UnreadableNotebookError(ValueError):
    """The file is not a notebook. The message says why."""


@dataclass(frozen=True)
class Result:
    """What one check said: see `course_lib.grading.verdict.Verdict`."""

    id: str
    title: str
    points: int
    status: str
    message: str
    case: str | None = None


@dataclass
class Report:
    """What the checks of a notebook said.

    Attributes:
        results: The last verdict on each exercise, in the order of the notebook.
        errors: Cells that raised outside of any check: (cell number, message).
        stopped: Why not all cells ran, or "".
    """

    results: list[Result] = field(default_factory=list)
    errors: list[tuple[int, str]] = field(default_factory=list)
    stopped: str = ""

    @property
    def exit_code(self) -> int:
        """0 where nothing failed and everything ran; what is still to do is no failure."""
        failed = any(result.status == "failed" for result in self.results)
        return 1 if failed or self.errors or self.stopped else 0


def run_checks(path: Path, *, env: dict[str, str] | None = None) -> Report:
    """Run a notebook and collect what its checks said.

    Args:
        path: The notebook.
        env: Variables to add to the kernel's environment.

    Raises:
        UnreadableNotebookError: If the file is not a notebook.
    """
    import nbformat
    from nbclient import NotebookClient
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    try:
        notebook = nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)
    except OSError as error:
        raise UnreadableNotebookError(f"Cannot read {path}: {error.strerror}.") from None
    except Exception as error:
        raise UnreadableNotebookError(f"{path} is not a notebook: {error}") from None
    report = Report()
    with tempfile.TemporaryDirectory(prefix="course-check-") as folder:
        verdicts = Path(folder) / "verdicts"
        verdicts.touch()
        recorder = nbformat.v4.new_code_cell(_RECORDER % str(verdicts))
        notebook.cells.insert(0, recorder)
        for cell in notebook.cells:
            if cell.cell_type == "code":
                cell.outputs, cell.execution_count = [], None
        client = NotebookClient(
            notebook,
            timeout=CELL_TIMEOUT,
            kernel_name="python3",
            allow_errors=True,
            store_widget_state=False,
            resources={"metadata": {"path": str(path.resolve().parent)}},
        )
        try:
            kernel_env = {**os.environ, "PYDEVD_DISABLE_FILE_VALIDATION": "1", **(env or {})}
            # The kernel's own warnings on stderr are not the learner's.
            client.execute(env=kernel_env, stderr=subprocess.DEVNULL)
        except CellTimeoutError:
            report.stopped = f"A cell ran longer than {CELL_TIMEOUT} s."
        except DeadKernelError:
            report.stopped = "The kernel died, perhaps for want of memory."
        lines = verdicts.read_text(encoding="utf-8").splitlines()
    by_id = {}
    for line in lines:
        result = Result(**json.loads(line))
        by_id[result.id] = result
    report.results = list(by_id.values())
    report.errors = _errors(notebook)
    return report


def _errors(notebook) -> list[tuple[int, str]]:
    """Cells that raised, numbered as the learner counts them; stubs are no errors."""
    found = []
    for number, cell in enumerate(notebook.cells):
        for output in cell.get("outputs", []):
            if output.output_type == "error" and output.ename != "NotImplementedError":
                first = re.sub(r"\x1b\[[0-9;]*m", "", output.evalue).strip().split("\n")[0]
                found.append((number, f"{output.ename}: {first}"))
    return found


def table(report: Report) -> str:
    """The report for a terminal."""
    signs = {"passed": "✓", "failed": "✗", "todo": "○"}
    words = {"passed": "passed", "failed": "not yet", "todo": "to do"}
    lines = []
    width = max((len(result.title) for result in report.results), default=0)
    for result in report.results:
        points = result.points if result.status == "passed" else 0
        line = (
            f"{signs[result.status]} {result.title:{width}}  {words[result.status]:7}  "
            f"{points} of {result.points}"
        )
        if result.status == "failed":
            case = f" ({result.case})" if result.case else ""
            line += f"\n    {result.message}{case}"
        lines.append(line)
    for number, message in report.errors:
        lines.append(f"✗ cell {number} raised {message}")
    if report.stopped:
        lines.append(f"✗ {report.stopped}")
    if not report.results:
        lines.append("No check ran in this notebook.")
    else:
        done = sum(r.points for r in report.results if r.status == "passed")
        lines.append(f"{done} of {sum(r.points for r in report.results)} points")
    return "\n".join(lines)
