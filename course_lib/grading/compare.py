"""What a correct answer returns, how far from it an answer may be, and where it first differs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from course_lib.grading.exercise import Data, Exercise

TOLERANCE_FACTOR = 4.0
"""The tolerance is this many times the worst error of the accepted answers."""


@dataclass(frozen=True)
class Expected:
    """What a correct answer returns for one case.

    Attributes:
        oracle: The true outputs, in fp64.
        like: The outputs of the first accepted answer: structure, shapes and dtypes.
        tolerance: Largest absolute error allowed, by the path of the output.
    """

    oracle: Any
    like: Any
    tolerance: dict[str, float]


@dataclass(frozen=True)
class Mismatch:
    """The first difference between an answer's outputs and the expected ones.

    Attributes:
        kind: "structure", "type", "shape", "dtype", "finite" or "value".
        path: Which output ("output", "output[1]", "output['lse']").
        message: One sentence that names the output and the difference.
        expected: The expected value or property, as text.
        actual: The answer's, as text.
        error: Absolute error in fp64 at the worst element; NaN where there is no such thing.
        tolerance: The largest error that would have passed; NaN likewise.
    """

    kind: str
    path: str
    message: str
    expected: str
    actual: str
    error: float = math.nan
    tolerance: float = math.nan


def copy_data(data: Any) -> Any:
    """A copy of plain data whose tensors share nothing with the original."""
    if isinstance(data, torch.Tensor):
        return data.detach().clone().requires_grad_(data.requires_grad)
    if isinstance(data, dict):
        return {key: copy_data(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return type(data)(copy_data(value) for value in data)
    return data


def leaves(tree: Any, path: str = "output") -> Iterator[tuple[str, Any]]:
    """The tensors and values of a tree of tuples, lists and dicts, each with its path."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from leaves(value, f"{path}[{key!r}]")
    elif isinstance(tree, list | tuple):
        for index, value in enumerate(tree):
            yield from leaves(value, f"{path}[{index}]")
    else:
        yield path, tree


def tensor_text(value: Any, limit: int = 12) -> str:
    """A value as the verdict card shows it: short, with four significant digits."""
    if not isinstance(value, torch.Tensor):
        return f"{value:.6g}" if isinstance(value, float) else repr(value)
    if value.ndim == 0:
        return tensor_text(value.item())
    if value.numel() > limit:
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"

    def nested(item: Any) -> str:
        if isinstance(item, list):
            return "[" + ", ".join(nested(each) for each in item) + "]"
        return f"{item:.4g}" if isinstance(item, float) else str(item)

    return nested(value.tolist())


def expected(exercise: Exercise, data: Data) -> Expected:
    """Compute the oracle and calibrate the tolerance on one case.

    The tolerance of each output is four times the worst error that an accepted answer makes on
    this very case, and at least one rounding of the output's dtype at the output's magnitude.
    """
    oracle = exercise.oracle(copy_data(data))
    outputs = [exercise.harness(answer, copy_data(data)) for answer in exercise.accepts]
    truth = dict(leaves(oracle))
    tolerance = {}
    for path, like in leaves(outputs[0]):
        if not _is_number(like):
            continue
        true = _as_fp64(truth[path])
        worst = max(_max_error(_as_fp64(dict(leaves(out))[path]), true) for out in outputs)
        finite = true[true.isfinite()]
        magnitude = finite.abs().max().item() if finite.numel() else 0.0
        floor = torch.finfo(like.dtype if _is_float_tensor(like) else torch.float64).eps * magnitude
        tolerance[path] = max(TOLERANCE_FACTOR * worst, floor)
    return Expected(oracle, outputs[0], tolerance)


def compare(actual: Any, want: Expected) -> Mismatch | None:
    """The first difference, structure before type before shape before values; None where equal."""
    return _structure(actual, want.like) or _values(actual, want)


def _structure(actual: Any, like: Any, path: str = "output") -> Mismatch | None:
    if isinstance(like, dict):
        if not isinstance(actual, dict) or set(actual) != set(like):
            return _differs("structure", path, f"a dict with keys {sorted(like)}", _kind(actual))
        pairs = [(actual[key], like[key], f"{path}[{key!r}]") for key in like]
    elif isinstance(like, list | tuple):
        if not isinstance(actual, list | tuple) or len(actual) != len(like):
            want = f"{len(like)} outputs (a tuple)"
            got = f"{len(actual)} outputs" if isinstance(actual, list | tuple) else _kind(actual)
            return _differs("structure", path, want, got)
        pairs = [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(actual, like, strict=True))]
    else:
        return _leaf(actual, like, path)
    return next(filter(None, (_structure(a, b, p) for a, b, p in pairs)), None)


def _leaf(actual: Any, like: Any, path: str) -> Mismatch | None:
    if isinstance(like, torch.Tensor):
        if like.ndim == 0 and isinstance(actual, int | float) and not isinstance(actual, bool):
            return None
        if not isinstance(actual, torch.Tensor):
            return _differs("type", path, "a torch.Tensor", _kind(actual))
        if actual.shape != like.shape:
            return _differs("shape", path, f"shape {list(like.shape)}", f"{list(actual.shape)}")
        if actual.dtype != like.dtype:
            return _differs("dtype", path, str(like.dtype), str(actual.dtype))
        return None
    if isinstance(like, float):
        number = isinstance(actual, int | float) and not isinstance(actual, bool)
        scalar = isinstance(actual, torch.Tensor) and actual.ndim == 0
        return None if number or scalar else _differs("type", path, "a number", _kind(actual))
    if type(actual) is not type(like):
        return _differs("type", path, f"of type {type(like).__name__}", _kind(actual))
    return None


def _values(actual: Any, want: Expected) -> Mismatch | None:
    true = dict(leaves(want.oracle))
    like = dict(leaves(want.like))
    for path, value in leaves(actual):
        if path not in want.tolerance:
            if value != true[path]:
                return _differs("value", path, repr(true[path]), repr(value))
            continue
        mismatch = _numbers(value, true[path], want.tolerance[path], path, like[path])
        if mismatch:
            return mismatch
    return None


def _numbers(value: Any, true: Any, tolerance: float, path: str, like: Any) -> Mismatch | None:
    actual, oracle = _as_fp64(value), _as_fp64(true)
    if actual.numel() == 0:
        return None
    error = _errors(actual, oracle)
    worst = int(error.argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape))
    if error.flatten()[worst] <= tolerance:
        return None
    got, should = actual.flatten()[worst].item(), oracle.flatten()[worst].item()
    finite = math.isfinite(got) or not math.isfinite(should)
    where = f"{path}[{', '.join(map(str, at))}]" if at else path
    small = isinstance(like, torch.Tensor) and like.numel() <= 12
    return Mismatch(
        "value" if finite else "finite",
        path,
        f"{where} is {got:.6g}, and should be {should:.6g}.",
        tensor_text(oracle) if small else f"{where} = {should:.6g}",
        tensor_text(actual) if small else f"{where} = {got:.6g}",
        float(error.flatten()[worst]),
        tolerance,
    )


def _errors(actual: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """Absolute errors; infinite wherever one is not finite and the other is not the same."""
    same = (actual == oracle) | (actual.isnan() & oracle.isnan())
    error = (actual - oracle).abs()
    return torch.where(same, 0.0, torch.where(error.isfinite(), error, math.inf))


def _max_error(actual: torch.Tensor, oracle: torch.Tensor) -> float:
    return float(_errors(actual, oracle).max()) if actual.numel() else 0.0


def _as_fp64(value: Any) -> torch.Tensor:
    return torch.as_tensor(value).detach().to("cpu", torch.float64)


def _is_float_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_number(value: Any) -> bool:
    return isinstance(value, torch.Tensor | float)


def _kind(value: Any) -> str:
    if value is None:
        return "None (is a `return` missing?)"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    name = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    return f"{name} {value!r}" if isinstance(value, int | float | str) else name


def _differs(kind: str, path: str, expected: str, actual: str) -> Mismatch:
    return Mismatch(kind, path, f"{path} should be {expected}; it is {actual}.", expected, actual)
