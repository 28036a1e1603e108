"""How fast a learner's kernel is on their own GPU, beside an accepted answer. Never a grade."""

from __future__ import annotations

from typing import Any

import torch

from course_lib.grading.compare import compare, expected
from course_lib.grading.exercise import Data, Exercise
from course_lib.runtime.device import supports_triton
from course_lib.runtime.measure import time_interleaved


def speed_note(exercise: Exercise, answer: Any, seed: int, device: str = "cuda") -> str:
    """One sentence on speed, or an empty one where there is no GPU.

    The largest case is run natively, compared once more, and timed beside the record's first
    accepted answer. Whatever goes wrong is said in the note: speed decides nothing.

    Args:
        exercise: A record of kind "kernel".
        answer: The learner's host function, which has passed under the interpreter.
        seed: For the case.
        device: Where to run.
    """
    if device == "cuda" and not (torch.cuda.is_available() and supports_triton("cuda")):
        return ""
    try:
        case = list(exercise.cases("large", seed))[-1]
        data = _to(case.data, device)
        want = expected(exercise, data)
        mismatch = compare(exercise.harness(answer, data), want)
        if mismatch is not None:
            return f"On your GPU it differs, on the case “{case.name}”: {mismatch.message}"
        runs = {"yours": answer, "accepted": exercise.accepts[0]}
        functions = {
            name: lambda each=each: exercise.harness(each, data) for name, each in runs.items()
        }
        times = time_interleaved(functions, device=device)
    except Exception as error:
        return f"On your GPU it could not be timed: {type(error).__name__}: {error}"
    yours, other = times["yours"].median, times["accepted"].median
    return (
        f"On your GPU, “{case.name}” takes {1e3 * yours:.3g} ms; "
        f"an accepted answer takes {1e3 * other:.3g} ms."
    )


def _to(data: Any, device: str) -> Data | Any:
    if isinstance(data, torch.Tensor):
        return data.to(device)
    if isinstance(data, dict):
        return {key: _to(value, device) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(_to(value, device) for value in data)
    return data
