"""What a correct answer returns, how far from it an answer may be, and where it first differs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from course_lib.grading.exercise import Data, Exercise

TOLERANCE_FACTOR = 4.0
"""The tolerance is this many times the worst error of the accepted answers."""

TOLERANCE_ROUNDINGS = 16.0
"""And at least this many roundings of the output's dtype at the output's magnitude: another honest
order of the same operations differs by a few."""


class RecordError(RuntimeError):
    """The exercise's own record is at fault, not the answer."""


@dataclass(frozen=True)
class Expected:
    """What a correct answer returns for one case.

    Attributes:
        oracle: The true outputs, in fp64.
        like: The outputs of the first accepted answer: structure, shapes and dtypes.
        tolerance: Largest absolute error allowed, by the path of the output.
        names: Names of the outputs of a tuple, for messages.
    """

    oracle: Any
    like: Any
    tolerance: dict[str, float]
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Mismatch:
    """The first difference between an answer's outputs and the expected ones.

    Attributes:
        kind: "structure", "type", "shape", "dtype", "finite" or "value".
        message: One sentence that names the output and the difference.
        expected: The expected value or property, as text.
        actual: The answer's, as text.
        error: Absolute error in fp64 at the worst element; NaN where there is no such thing.
        tolerance: The largest error that would have passed; NaN likewise.
    """

    kind: str
    message: str
    expected: str
    actual: str
    error: float = math.nan
    tolerance: float = math.nan


def copy_data(data: Any) -> Any:
    """A copy of plain data. Tensors keep their strides and offsets and share no storage with it."""
    if isinstance(data, torch.Tensor):
        storage = data.detach().untyped_storage().clone()
        copy = torch.empty(0, dtype=data.dtype, device=data.device)
        copy.set_(storage, data.storage_offset(), data.shape, data.stride())
        return copy.requires_grad_(data.requires_grad)
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


def same_data(a: Any, b: Any) -> bool:
    """Whether two trees of plain data hold the same values; NaN equals NaN."""
    if isinstance(a, torch.Tensor):
        alike = isinstance(b, torch.Tensor) and a.shape == b.shape and a.dtype == b.dtype
        return alike and torch.equal(a.detach().nan_to_num(7.0), b.detach().nan_to_num(7.0))
    if isinstance(a, dict):
        return (
            isinstance(b, dict) and a.keys() == b.keys() and all(same_data(a[k], b[k]) for k in a)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_data, a, b))
    return a == b or (a != a and b != b)


def value_text(value: Any, limit: int = 12) -> str:
    """A value as the verdict card shows it: short, with four significant digits."""
    if isinstance(value, torch.Tensor) and value.numel() > limit:
        return f"{str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    if isinstance(value, torch.Tensor):
        value = value.tolist()
    if isinstance(value, list | tuple):
        shown = [value_text(each) for each in value[:limit]]
        more = f", … {len(value):,} in all" if len(value) > limit else ""
        return "[" + ", ".join(shown) + more + "]"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _short(repr(value))


def expected(
    exercise: Exercise, data: Data, run: Callable[[Any, Data], Any] | None = None
) -> Expected:
    """Compute the oracle and calibrate the tolerance on one case.

    The tolerance of each output is four times the worst error that an accepted answer makes on
    this very case, and at least `TOLERANCE_ROUNDINGS` roundings of the output's dtype.

    Args:
        exercise: The record.
        data: One case's data.
        run: How an answer is run on data; default: the exercise's harness.

    Raises:
        RecordError: If an accepted answer is not finite where the oracle is, or their structures
            differ.
    """
    run = run or exercise.harness
    oracle = exercise.oracle(copy_data(data))
    outputs = [run(answer, copy_data(data)) for answer in exercise.accepts]
    truth = dict(leaves(oracle))
    tolerance = {}
    for path, like in leaves(outputs[0]):
        if path not in truth:
            raise RecordError(f"{exercise.id}: the oracle has no {path}.")
        if not _is_inexact(like):
            continue
        true = _as_fp64(truth[path])
        errors = [_errors(_as_fp64(dict(leaves(output))[path]), true) for output in outputs]
        worst = max((float(error.max()) for error in errors if error.numel()), default=0.0)
        if not math.isfinite(worst):
            raise RecordError(f"{exercise.id}: an accepted answer is not finite in {path}.")
        dtype = like.dtype if isinstance(like, torch.Tensor) else torch.float64
        floor = TOLERANCE_ROUNDINGS * torch.finfo(dtype).eps * _magnitude(true)
        tolerance[path] = max(TOLERANCE_FACTOR * worst, floor)
    return Expected(oracle, outputs[0], tolerance, exercise.outputs)


def compare(actual: Any, want: Expected) -> Mismatch | None:
    """The first difference, structure before type before shape before values; None where equal."""
    return _compare(actual, want.like, want.oracle, want, "output")


def agree(actual: Any, other: Any, want: Expected) -> bool:
    """Whether two answers' outputs are the same within the tolerance, whatever is right."""
    tolerance = {
        path: max(
            want.tolerance.get(path, 0.0),
            4 * TOLERANCE_ROUNDINGS * torch.finfo(torch.float32).eps * _magnitude(_as_fp64(value)),
        )
        for path, value in leaves(other)
        if _is_inexact(value)
    }
    return compare(actual, Expected(other, other, tolerance)) is None


def _compare(actual: Any, like: Any, true: Any, want: Expected, path: str) -> Mismatch | None:
    if isinstance(like, dict):
        if not isinstance(actual, dict) or set(actual) != set(like):
            got = (
                f"a dict with keys {sorted(map(str, actual))}" if isinstance(actual, dict) else None
            )
            return _differs(
                "structure", want, path, f"a dict with keys {sorted(like)}", got, actual
            )
        triples = [(actual[k], like[k], true[k], f"{path}[{k!r}]") for k in like]
    elif isinstance(like, list | tuple):
        if not isinstance(actual, list | tuple) or len(actual) != len(like):
            plural = f"{len(like)} values, returned together"
            got = f"{len(actual)} values" if isinstance(actual, list | tuple) else None
            return _differs("structure", want, path, plural, got, actual)
        triples = [(actual[i], like[i], true[i], f"{path}[{i}]") for i in range(len(like))]
    else:
        return _compare_leaf(_plain_scalar(actual), like, true, want, path)
    return next(filter(None, (_compare(a, b, t, want, p) for a, b, t, p in triples)), None)


def _compare_leaf(actual: Any, like: Any, true: Any, want: Expected, path: str) -> Mismatch | None:
    number = isinstance(actual, int | float) and not isinstance(actual, bool)
    if isinstance(like, torch.Tensor):
        if like.ndim == 0 and number:
            return _compare_numbers(actual, like, true, want, path)
        if not isinstance(actual, torch.Tensor):
            return _differs("type", want, path, "a torch.Tensor", None, actual)
        if actual.shape != like.shape:
            shapes = f"of shape {list(like.shape)}", f"of shape {list(actual.shape)}"
            return _differs("shape", want, path, *shapes, actual)
        if actual.dtype != like.dtype:
            return _differs("dtype", want, path, str(like.dtype), str(actual.dtype), actual)
        return _compare_numbers(actual, like, true, want, path)
    if isinstance(like, float):
        if not number and not (isinstance(actual, torch.Tensor) and actual.ndim == 0):
            return _differs("type", want, path, "a number", None, actual)
        return _compare_numbers(actual, like, true, want, path)
    if isinstance(like, int) and not isinstance(like, bool) and number and actual == int(actual):
        actual = int(actual)
    if type(actual) is not type(like):
        return _differs("type", want, path, f"of type {type(like).__name__}", None, actual)
    if actual != true:
        return _differs("value", want, path, _short(repr(true)), _short(repr(actual)), actual)
    return None


def _compare_numbers(
    actual: Any, like: Any, true: Any, want: Expected, path: str
) -> Mismatch | None:
    value, oracle = _as_fp64(actual), _as_fp64(true)
    error = _errors(value, oracle)
    tolerance = want.tolerance.get(path, 0.0)
    if error.numel() == 0 or float(error.max()) <= tolerance:
        return None
    worst = int(error.argmax())
    at = [int(i) for i in torch.unravel_index(torch.tensor(worst), error.shape)]
    got, should = value.flatten()[worst].item(), oracle.flatten()[worst].item()
    off = float(error.flatten()[worst])
    name = _name(want, path)
    where = f"{name}[{', '.join(map(str, at))}]" if at else name
    got_text, should_text = _distinct(got, should)
    allowed = f"at most {tolerance:.2g} passes" if tolerance else "it must be exact"
    by = f" It is off by {off:.2g}; {allowed}." if math.isfinite(off) else ""
    small = isinstance(like, torch.Tensor) and 1 < like.numel() <= 12
    return Mismatch(
        "value" if math.isfinite(got) or not math.isfinite(should) else "finite",
        f"{where} is {got_text}, and should be {should_text}.{by}",
        f"{name} = {value_text(oracle)}" if small else f"{where} = {should_text}",
        f"{name} = {value_text(value)}" if small else f"{where} = {got_text}",
        off,
        tolerance,
    )


def _errors(actual: torch.Tensor, oracle: torch.Tensor) -> torch.Tensor:
    """Absolute errors; infinite wherever one is not finite and the other is not the same."""
    if actual.shape != oracle.shape:
        raise RecordError(f"shapes {list(actual.shape)} and {list(oracle.shape)} were compared.")
    same = (actual == oracle) | (actual.isnan() & oracle.isnan())
    error = (actual - oracle).abs()
    return torch.where(same, 0.0, torch.where(error.isfinite(), error, math.inf))


def _magnitude(true: torch.Tensor) -> float:
    finite = true[true.isfinite()]
    return finite.abs().max().item() if finite.numel() else 0.0


def _as_fp64(value: Any) -> torch.Tensor:
    tensor = torch.as_tensor(value).detach()
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.to("cpu", torch.float64)


def _is_inexact(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.is_floating_point() or value.is_complex()
    return isinstance(value, float)


def _plain_scalar(value: Any) -> Any:
    """NumPy's scalars as Python's; everything else as it is."""
    is_numpy = type(value).__module__ == "numpy" and not getattr(value, "ndim", 1)
    return value.item() if is_numpy else value


def _name(want: Expected, path: str) -> str:
    """What the learner calls an output: its name, where the record gives names."""
    for index, name in enumerate(want.names):
        path = path.replace(f"output[{index}]", name)
    return path


def _distinct(a: float, b: float) -> tuple[str, str]:
    """Two numbers with just enough digits to tell them apart."""
    for digits in (5, 7, 9, 12, 17):
        texts = f"{a:.{digits}g}", f"{b:.{digits}g}"
        if texts[0] != texts[1]:
            break
    return texts


def _kind(value: Any) -> str:
    if value is None:
        return "None (is a `return` missing?)"
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)} values"
    if type(value).__module__ == "numpy":
        return f"numpy's {type(value).__name__} (torch.from_numpy makes a tensor of it)"
    name = f"{type(value).__module__}.{type(value).__name__}".removeprefix("builtins.")
    return f"{name} {_short(repr(value))}" if isinstance(value, int | float | str) else name


def _short(text: str, limit: int = 120) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _differs(
    kind: str, want: Expected, path: str, should: str, got: str | None, actual: Any
) -> Mismatch:
    got = got or _kind(actual)
    return Mismatch(kind, f"{_name(want, path)} should be {should}; it is {got}.", should, got)
