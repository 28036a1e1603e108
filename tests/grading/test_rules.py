"""What a submission's text proves, and the text that is executed: read here, and never run."""

from __future__ import annotations

import sys
import time

import pytest

from course_lib.grading.cells import read_cells
from course_lib.grading.rules import Notebook

SOFTMAX = ("aten::_softmax", "aten::logsumexp", "aten::scaled_dot_product_attention")


def forbidden(*cells: str) -> str | None:
    """The place of a forbidden operator on the path of `answer`."""
    found = Notebook(read_cells(cells)).forbidden("answer", SOFTMAX)
    return None if found is None else f"{found[0]} {found[1]}"


@pytest.mark.parametrize(
    "cells",
    [
        ["import torch\ndef answer(x): return torch.softmax(x, 0)"],
        ["import torch", "def answer(x): return torch.nn.functional.softmax(x, 0)"],
        ["import torch.nn.functional as F\ndef answer(x): return F.softmax(x, 0)"],
        ["from torch.nn import functional as F\ndef answer(x): return F.softmax(x, 0)"],
        ["from torch import softmax as s\ndef answer(x): return s(x, 0)"],
        ["import torch as t\ndef answer(x): return t.ops.aten._softmax.default(x, 0, False)"],
        ["import torch\ndef answer(x): return torch.nn.Softmax(0)(x)"],
        ["def answer(x): return (x * 2).softmax(-1)"],
        ["def answer(x): return x.logsumexp(0)"],
        ["import torch\ndef helper(x): return torch.softmax(x, 0)", "def answer(x):\n  helper(x)"],
        ["import torch\nanswer = lambda x: torch.softmax(x, 0)"],
        ["import torch\nf = torch.softmax\ndef answer(x): return f(x, 0)"],
        [
            "import torch\nimport functools\nf = functools.partial(torch.softmax, dim=0)",
            "def answer(x): return f(x)",
        ],
        [
            "import torch\nclass Own:\n  def run(self, x): return torch.softmax(x, 0)",
            "def answer(x): return Own().run(x)",
        ],
        ["import torch\nif True:\n  def answer(x): return torch.softmax(x, 0)"],
        ["%%time\nimport torch\ndef answer(x): return torch.softmax(x, 0)"],
    ],
)
def test_a_forbidden_operator_on_the_path_is_found(cells: list[str]) -> None:
    assert forbidden(*cells), cells


@pytest.mark.parametrize(
    "cells",
    [
        ["def answer(x): return x"],
        ["import torch\nexpected = torch.softmax(x, 0)", "def answer(x): return x"],
        ["import torch\ndef test(x): return torch.softmax(x, 0)", "def answer(x): return x"],
        # A name inside the function is its own, whatever stands under it outside.
        [
            "import torch\ndef weights(x): return torch.softmax(x, 0)",
            "def answer(x):\n  weights = x.exp()\n  return weights / weights.sum()",
        ],
        ["import torch\nout = torch.softmax(x, 0)\ndef answer(x, out=None): return out"],
        ["import torch\ntable = torch.softmax(x, 0)\ndef answer(x): return table * x"],
        # An earlier version does not count.
        ["import torch\ndef answer(x): return torch.softmax(x, 0)", "def answer(x): return x"],
        # Their own function of that name, and another library's.
        ["def softmax(x): return x.exp() / x.exp().sum()\ndef answer(x): return softmax(x)"],
        ["from scipy import special\ndef answer(x): return special.softmax(x)"],
        [
            "class Mine:\n  def softmax(self): return 1\nmine = Mine()",
            "def answer(x): return mine.softmax()",
        ],
        ['def answer(x):\n  """Like torch.softmax(x)."""\n  # torch.softmax(x)\n  return x'],
        ["import torch\ndef answer(x): return torch.logaddexp(x, x)"],
        ["def answer(x: return torch.softmax(x)"],
    ],
)
def test_what_is_not_on_the_path_is_not_claimed(cells: list[str]) -> None:
    assert forbidden(*cells) is None


def test_the_place_is_the_students_own_line() -> None:
    cells = "import torch", "# first\ndef answer(x):\n    y = 2\n    return torch.softmax(x, 0)"
    assert forbidden(*cells) == "aten::_softmax cell 2, line 4: `return torch.softmax(x, 0)`"


KERNEL = """
@triton.jit
def kernel(x_ptr): pass
"""


@pytest.mark.parametrize(
    ("cells", "may"),
    [
        ([f"{KERNEL}\ndef answer(x): kernel[(1,)](x)"], True),
        ([KERNEL, "def answer(x):\n  launch = kernel[(1,)]\n  launch(x)"], True),
        ([KERNEL, "def answer(x): kernel.run(x, grid=(1,), warmup=False)"], True),
        ([KERNEL, "def start(x): kernel[(1,)](x)", "def answer(x): start(x)"], True),
        ([KERNEL, "kernels = {'a': kernel}", "def answer(x): kernels['a'][(1,)](x)"], True),
        ([KERNEL, "def answer(x): globals()['ker' + 'nel'][(1,)](x)"], True),
        ([KERNEL, "def other(x): kernel[(1,)](x)\nanswer = other"], True),
        ([f"{KERNEL}\ndef answer(x): return x.sum(1)"], False),
        (["def answer(x): return x.sum(1)"], False),
        ([KERNEL, "def other(x): kernel[(1,)](x)", "def answer(x): return x.sum(1)"], False),
    ],
)
def test_an_answer_that_launches_nothing(cells: list[str], may: bool) -> None:
    assert Notebook(read_cells(tuple(cells))).may_launch("answer") is may


def test_definitions_are_found_wherever_they_stand() -> None:
    cells = (
        "def f(): pass",
        "try:\n  f = 1\nexcept E:\n  f, g = 2, 3",
        "for i in x:\n  class f: pass",
    )
    places = Notebook(read_cells(cells)).places("f")
    assert [(each.cell, each.line) for each in places] == [(1, 1), (2, 2), (2, 4), (3, 2)]


# Cells.


@pytest.mark.parametrize(
    ("text", "python"),
    [
        ("x = 1", "x = 1"),
        ("%time x = 1", "x = 1"),
        ("%%time\nx = 1", "\nx = 1"),
        ("%%capture out\nx = 1", "\nx = 1"),
        ("%%bash\nrm -rf /", ""),
        ("    x = 1\n    y = 2", "x = 1\ny = 2"),
    ],
)
def test_notation_of_notebooks_becomes_python(text: str, python: str) -> None:
    (cell,) = read_cells((text,))
    assert cell.python.rstrip() == python
    assert cell.tree is not None


def test_magics_become_calls_and_broken_cells_stay_what_they_are() -> None:
    magic, broken = read_cells(("%matplotlib inline\n!ls", "def f(:"))
    assert "get_ipython()" in magic.python
    assert (broken.tree, broken.python) == (None, "def f(:")
    assert broken.note == "line 1: invalid syntax"


@pytest.mark.parametrize(
    "text",
    [
        "(" * 100_000,
        "[" * 90 + "]" * 90,
        "-" * 200_000 + "1",
        "+".join(["1"] * 100_000),
        "x" + ".y" * 50_000,
        "if x:\n" + "\n".join(" " * depth + "if x:" for depth in range(1, 150)),
        "\n".join(["%x"] * 20_000),
        "!" * 100_000,
        "a = 1\0",
        "\ud800".encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace"),
        "lambda: " * 5_000 + "0",
        "f'{" * 100 + "}" * 100,
        "9" * 10_000,
        "@a" + ".b" * 50_000 + "\ndef answer(x): kernel[(1,)](x)",
    ],
    ids=range(14),
)
def test_text_that_is_made_to_break_the_reader_does_not(text: str) -> None:
    began = time.process_time()
    limit = sys.getrecursionlimit()
    cells = read_cells((text, "def answer(x): return x"))
    notebook = Notebook(cells)
    assert notebook.places("answer")
    assert forbidden(text, "def answer(x): return x") is None
    assert not notebook.may_launch("answer")
    assert sys.getrecursionlimit() == limit
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "cells",
    [
        ["def answer(f): return f.__closure__[0].cell_contents.__name__ == 'right'"],
        ["import sys\ndef answer(x): return sys._getframe(1).f_locals['data']"],
        ["import torch\ndef answer(x): return getattr(torch, 'soft' + 'max')(x, -1)"],
        ["def answer(x): return eval('torch.soft' + 'max')(x, -1)"],
        ["import gc\ndef helper(): return gc.get_objects()", "def answer(x): return helper()"],
        # Anywhere, since it changes what every answer is counted by.
        [
            "import course_lib.runtime.measure as m\nm.measure_memory = None",
            "def answer(x): return x",
        ],
    ],
)
def test_an_answer_that_looks_around_is_noticed(cells: list[str]) -> None:
    assert Notebook(read_cells(cells)).looks_around("answer") is not None


@pytest.mark.parametrize(
    "cells",
    [
        ["def answer(x): return x"],
        ["def answer(x): return getattr(x, 'dtype')"],
        ["import gc\ngc.get_objects()", "def answer(x): return x"],  # not on the answer's path
        ["import course_lib.runtime.measure as m\nm.measure_memory", "def answer(x): return x"],
        ["class A: pass\na = A()\na.measure_memory = 1", "def answer(x): return x"],
    ],
)
def test_an_honest_answer_does_not(cells: list[str]) -> None:
    assert Notebook(read_cells(cells)).looks_around("answer") is None
