"""What honest learners do to a notebook, and what each of these notebooks deserves."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from tests.grading.honest.notebooks import RECORDS, SLUG, Notebook, accepted

HALF = ("overflow_score", "safe_softmax", "online_softmax", "merge_states", "bytes_moved")
"""What a learner has done here before the habit comes in: quick to judge, and of several kinds."""

SLOW = ("torch.testing",)
"""In worked cells that take long, since it is long to import; many a learner deletes them."""


@dataclass(frozen=True)
class Habit:
    """One odd and honest notebook, and its just grade.

    Attributes:
        name: Of the function that builds it.
        make: Changes a notebook in which `HALF` is solved.
        passes: Exercises that pass. All others are missing, but for those in `fails`.
        fails: Status and a part of the feedback, by exercise.
        notes: Parts of what is said of the cells, one each.
        findings: Rule, by exercise.
        file: Its file's name.
        whole: Whether it keeps the worked cells that take longest.
    """

    name: str
    make: Callable[[Notebook], object]
    passes: tuple[str, ...] = HALF
    fails: dict[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    findings: dict[str, str] = field(default_factory=dict)
    file: str = f"{SLUG}.ipynb"
    whole: bool = False

    def write(self, folder: Path) -> None:
        """Hand it in, as a student of the habit's name."""
        notebook = Notebook().solve(*HALF)
        if not self.whole:
            notebook.drop(*SLOW)
        changed = self.make(notebook)
        data = changed if isinstance(changed, bytes) else notebook.bytes()
        path = folder / self.name / self.file
        path.parent.mkdir(parents=True)
        path.write_bytes(data)


HABITS: list[Habit] = []


def habit(**deserves) -> Callable[[Callable[[Notebook], object]], Callable[[Notebook], object]]:
    """Register the function below under its own name."""

    def register(make: Callable[[Notebook], object]) -> Callable[[Notebook], object]:
        HABITS.append(Habit(make.__name__, make, **deserves))
        return make

    return register


def without(*names: str) -> tuple[str, ...]:
    return tuple(name for name in HALF if name not in names)


# Complete ones, and hardly begun ones.


@habit(passes=tuple(RECORDS), findings={"split_decode": "library operator"}, whole=True)
def everything_solved(notebook: Notebook) -> None:
    notebook.solve()


@habit(passes=tuple(RECORDS), findings={"split_decode": "library operator"}, whole=True)
def everything_solved_otherwise(notebook: Notebook) -> None:
    notebook.solve(variant=1)


@habit(whole=True)
def half_of_it(notebook: Notebook) -> None:
    pass


@habit(passes=())
def nothing_done(notebook: Notebook) -> bytes:
    return Notebook().bytes()


@habit(passes=("bytes_moved",))
def one_cell_of_ones_own(notebook: Notebook) -> None:
    """No setup, no imports, no stubs: the answer alone, in a renamed file."""
    notebook.content["cells"] = []
    notebook.last(accepted("bytes_moved")).cells[0]["id"] = f"{SLUG}-029"


@habit(file="Homework 3 FINAL (2).ipynb")
def a_renamed_file(notebook: Notebook) -> None:
    pass


# Where code stands.


@habit()
def helpers_in_other_cells(notebook: Notebook) -> None:
    notebook.first("def top_of(x):\n    return x.amax(dim=-1, keepdim=True)")
    notebook.write(
        "safe_softmax",
        "def safe_softmax(scores):\n"
        "    wide = scores.float()\n"
        "    return normalised(torch.exp(wide - top_of(wide))).half()",
    )
    notebook.last("def normalised(x):\n    return x / x.sum(dim=-1, keepdim=True)")


@habit(
    passes=without("safe_softmax"),
    fails={"safe_softmax": ("error", "'Tensor' object is not callable. Cell 7")},
    whole=True,
)
def a_helper_whose_name_is_taken_later(notebook: Notebook) -> None:
    """A worked cell further down calls a tensor `largest`. In Jupyter it fails likewise."""
    notebook.first("def largest(x):\n    return x.amax(dim=-1, keepdim=True)")
    notebook.write(
        "safe_softmax",
        "def safe_softmax(scores):\n"
        "    terms = torch.exp(scores.float() - largest(scores.float()))\n"
        "    return (terms / terms.sum(dim=-1, keepdim=True)).half()",
    )


@habit()
def answers_at_the_end(notebook: Notebook) -> None:
    """Below their checks, which then checked nothing."""
    for name in HALF:
        notebook.cells.append(notebook.cells.pop(notebook.at(name)))


@habit()
def lost_metadata(notebook: Notebook) -> None:
    for cell in notebook.cells:
        cell["metadata"] = {}
        cell.pop("id", None)
    notebook.content["metadata"] = {}


@habit()
def notes_between(notebook: Notebook) -> None:
    for name in HALF:
        notebook.insert(notebook.at(name), f"My thoughts on `{name}`: 1 < 2 & $x^2$", "markdown")
        notebook.insert(notebook.at(name), "def raw(:", "raw")


@habit()
def the_answer_in_pieces(notebook: Notebook) -> None:
    """Two exercises in one cell, and a third in two cells."""
    both = f"{accepted('safe_softmax')}\n\n\n{accepted('merge_states', 1)}"
    notebook.write("safe_softmax", both)
    del notebook.cells[notebook.at("merge_states")]
    notebook.first("LARGEST = 65504")
    notebook.write("overflow_score", "overflow_score = math.log(LARGEST)")


@habit(findings={"safe_softmax": "defined twice"})
def wrong_first_then_right(notebook: Notebook) -> None:
    wrong = "def safe_softmax(scores):\n    return torch.exp(scores)"
    notebook.insert(notebook.at("safe_softmax"), wrong)


@habit(
    passes=without("safe_softmax"),
    fails={"safe_softmax": ("failed", "")},
    findings={"safe_softmax": "defined twice"},
)
def right_first_then_wrong(notebook: Notebook) -> None:
    notebook.last("def safe_softmax(scores):\n    return torch.exp(scores)")


@habit(passes=without("safe_softmax"))
def the_stub_defined_again(notebook: Notebook) -> None:
    """The last definition counts, and this one is none."""
    notebook.last("def safe_softmax(scores):\n    raise NotImplementedError")


# Style.


@habit()
def in_place(notebook: Notebook) -> None:
    notebook.write(
        "safe_softmax",
        "def safe_softmax(scores):\n"
        "    x = scores.float()\n"
        "    x -= x.amax(-1, keepdim=True)\n"
        "    x.exp_()\n"
        "    x /= x.sum(-1, keepdim=True)\n"
        "    return x.to(torch.float16)",
    )


@habit(passes=without("safe_softmax"), fails={"safe_softmax": ("failed", "changed its input")})
def in_place_on_the_input(notebook: Notebook) -> None:
    notebook.write(
        "safe_softmax",
        "def safe_softmax(scores):\n"
        "    scores -= scores.amax(-1, keepdim=True)\n"
        "    x = scores.float().exp()\n"
        "    return (x / x.sum(-1, keepdim=True)).half()",
    )


@habit(findings={"merge_states": "defined twice", "bytes_moved": "defined twice"})
def lambdas_partials_and_objects(notebook: Notebook) -> None:
    notebook.write(
        "safe_softmax",
        "_shifted = lambda s: (s.float() - s.float().amax(-1, True)).exp()\n"
        "safe_softmax = lambda s: (_shifted(s) / _shifted(s).sum(-1, True)).half()",
    )
    notebook.write(
        "merge_states",
        f"{accepted('merge_states')}\n\n"
        "import functools\n_merge = merge_states\n"
        "class Merge:\n    def __call__(self, *args):\n        return _merge(*args)\n"
        "merge_states = Merge()",
    )
    notebook.write(
        "bytes_moved",
        f"{accepted('bytes_moved')}\n\n"
        "def with_options(verbose, *args):\n    return _bytes(*args)\n"
        "_bytes = bytes_moved\n"
        "bytes_moved = functools.partial(with_options, False)",
    )


@habit()
def type_hints_and_dataclasses(notebook: Notebook) -> None:
    notebook.first(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\nfrom typing import NamedTuple\n"
        "@dataclass\nclass Sizes:\n    Tq: int\n    Tk: int\n"
        "class State(NamedTuple):\n    row_max: torch.Tensor\n    row_sum: Unknown"
    )
    notebook.write(
        "online_softmax",
        "def online_softmax(tiles: Iterator[torch.Tensor]) -> State:\n"
        "    row_max, row_sum = torch.tensor(-math.inf), torch.tensor(0.0)\n"
        "    for tile in tiles:\n"
        "        if (new_max := torch.maximum(row_max, tile.max())) is not None:\n"
        "            row_sum = row_sum * (row_max - new_max).exp() + (tile - new_max).exp().sum()\n"
        "            row_max = new_max\n"
        "    return State(row_max, row_sum)",
    )
    # As in a notebook, where the future of one cell is not that of the next.
    notebook.cells[notebook.at("online_softmax")]["source"] = (
        "from __future__ import annotations\n"
        + notebook.cells[notebook.at("online_softmax")]["source"]
    )


@habit(fails={"first_flash": ("error", "float")})
def star_imports(notebook: Notebook) -> None:
    # torch's `float` is now the float of the kernel's stub, too.
    notebook.first("from math import *\nfrom torch import *\nfrom numpy import *")
    notebook.write(
        "safe_softmax",
        "from torch import *\n"
        "def safe_softmax(scores):\n"
        "    x = exp(scores.float() - amax(scores.float(), -1, True))\n"
        "    return (x / x.sum(-1, keepdim=True)).half()",
    )


@habit(findings={"bytes_moved": "defined twice"})
def numbers_of_other_types(notebook: Notebook) -> None:
    notebook.write("overflow_score", "import numpy as np\noverflow_score = np.log(65504.0)")
    notebook.write(
        "bytes_moved",
        f"{accepted('bytes_moved')}\n\n"
        "_bytes = bytes_moved\n"
        "def bytes_moved(*args):\n    return [np.int64(each) for each in _bytes(*args)]",
    )


@habit(passes=(*HALF, "two_new_tokens"))
def a_small_letter(notebook: Notebook) -> None:
    notebook.write("two_new_tokens", 'two_new_tokens = "d"')


@habit()
def unicode_names(notebook: Notebook) -> None:
    notebook.write(
        "safe_softmax",
        "def safe_softmax(scores):\n"
        "    σ = scores.float()  # größter Wert → 最大值 😀\n"
        "    größe = (σ - σ.amax(-1, keepdim=True)).exp()\n"
        "    return (größe / größe.sum(-1, keepdim=True)).half()",
    )


# Wrong ones, which fail and do not crash.


@habit(
    passes=without("safe_softmax", "merge_states"),
    fails={
        "safe_softmax": ("failed", "numpy's ndarray (torch.from_numpy makes a tensor of it)"),
        "merge_states": ("failed", "should be a torch.Tensor"),
    },
)
def numpy_for_torch(notebook: Notebook) -> None:
    notebook.write(
        "safe_softmax",
        "def safe_softmax(scores):\n"
        "    x = (scores.float() - scores.float().amax(-1, True)).exp()\n"
        "    return (x / x.sum(-1, keepdim=True)).half().numpy()",
    )
    notebook.write(
        "merge_states",
        "import numpy as np\n"
        "def merge_states(out_a, lse_a, out_b, lse_b):\n"
        "    return np.array(out_a), np.array(lse_a)",
    )


@habit(
    passes=without("safe_softmax", "online_softmax", "bytes_moved", "overflow_score"),
    fails={
        "safe_softmax": ("failed", "torch.float16"),
        "online_softmax": ("failed", "None (is a `return` missing?)"),
        "bytes_moved": ("error", "It raised"),
        "overflow_score": ("failed", "Not this one."),
    },
)
def wrong_in_four_ways(notebook: Notebook) -> None:
    notebook.write(
        "safe_softmax",
        "def safe_softmax(scores):\n"
        "    x = (scores.float() - scores.float().amax(-1, True)).exp()\n"
        "    return x / x.sum(-1, keepdim=True)",
    )
    notebook.write("online_softmax", "def online_softmax(tiles):\n    for tile in tiles: pass")
    notebook.write("bytes_moved", "def bytes_moved(*args):\n    return args[0] / 0")
    notebook.write("overflow_score", "overflow_score = 12")


@habit(
    passes=without("safe_softmax", "overflow_score"),
    fails={"safe_softmax": ("failed", "function"), "overflow_score": ("failed", "")},
)
def values_where_functions_are_asked(notebook: Notebook) -> None:
    notebook.write("safe_softmax", "safe_softmax = torch.softmax(torch.ones(2, 2), 1).half()")
    notebook.write("overflow_score", "def overflow_score():\n    return 11.09")


@habit(passes=without("safe_softmax"), notes=("Cell 6: line 1: expected ':'.",))
def a_cell_that_is_no_python(notebook: Notebook) -> None:
    notebook.write("safe_softmax", "def safe_softmax(scores)\n    return scores")


@habit(
    passes=("overflow_score",),
    fails={
        "bytes_moved": ("error", "It raised NameError: name 'math' is not defined. Cell 16"),
        "safe_softmax": ("missing", "Cell 5, which defines it, raised NameError."),
    },
)
def imports_deleted(notebook: Notebook) -> None:
    """What needs torch or math fails, and says why."""
    for number, cell in reversed(list(enumerate(notebook.cells))):
        if "setup(" in "".join(cell["source"]):
            del notebook.cells[number]
    for name in HALF:
        cell = notebook.cells[notebook.at(name)]
        lines = [line for line in cell["source"].splitlines() if " import " not in f" {line}"]
        cell["source"] = "\n".join(lines)


# What the exercise forbids.


@habit(
    passes=without("safe_softmax"),
    fails={"safe_softmax": ("forbidden", "calls `aten::_softmax`")},
    findings={"safe_softmax": "forbidden operator"},
)
def the_library_in_place_of_an_answer(notebook: Notebook) -> None:
    notebook.write(
        "safe_softmax", "def safe_softmax(scores):\n    return scores.float().softmax(-1).half()"
    )


# What else stands in notebooks.


@habit()
def prints_and_warnings(notebook: Notebook) -> None:
    notebook.first(
        "import logging, sys, warnings\n"
        "for line in range(50_000):\n    print('line', line)\n"
        "print('x' * 3_000_000)\n"
        "warnings.warn('careful')\nlogging.getLogger().warning('careful')\n"
        "sys.stderr.write('careful' * 1000)"
    )
    notebook.write(
        "safe_softmax",
        "def safe_softmax(scores):\n"
        "    print('scores', scores)\n"
        "    warnings.warn('slow', DeprecationWarning)\n"
        "    x = (scores.float() - scores.float().amax(-1, True)).exp()\n"
        "    print(x.sum(), file=sys.stderr, flush=True)\n"
        "    return (x / x.sum(-1, keepdim=True)).half()",
    )


@habit(notes=("%%javascript is not run", "%%bash is not run"))
def magics_and_shell_lines(notebook: Notebook) -> None:
    notebook.first(
        "%matplotlib inline\n%load_ext autoreload\n%autoreload 2\n"
        "!pip install torch\nfiles = !ls\n!nvidia-smi\ntorch.softmax?\n%env X=1"
    )
    notebook.first("%%bash\necho hello; exit 1")
    notebook.first("%%javascript\nalert(1)")
    notebook.write("safe_softmax", f"%%time\n{accepted('safe_softmax')}")
    notebook.write("merge_states", f"%%timeit -n 1\nmerging = 1\n\n{accepted('merge_states')}")
    notebook.write("overflow_score", "%time overflow_score = math.log(65504)")
    notebook.last("%timeit safe_softmax(torch.ones(2, 2).half())\nsafe_softmax??")


@habit()
def plots(notebook: Notebook) -> None:
    notebook.last(
        "import matplotlib.pyplot as plt\nimport numpy as np\n"
        "fig, axes = plt.subplots(1, 2, figsize=(6, 2))\n"
        "axes[0].plot(np.linspace(0, 1), label='x')\nplt.legend()\nplt.show()\n"
        "plt.savefig('plot.png')\ndisplay(fig)\nfig"
    )
    notebook.last("import plotly.express as px\npx.line(y=[1, 2]).show()")


@habit()
def checks_hints_and_widgets(notebook: Notebook) -> None:
    notebook.first(
        "from course_lib import hint, solution, interpreted\n"
        "import ipywidgets as widgets\nfrom ipywidgets import interact\n"
        "from IPython.display import HTML, clear_output, display\n"
        "display(widgets.IntSlider(), HTML('<b>x</b>'))\nclear_output()\n"
        "@interact(x=(0, 3))\ndef draw(x):\n    return x\n"
        "hint('safe_softmax')\nhint('safe_softmax').show()"
    )
    notebook.last(
        "verdict = check(safe_softmax)\n"
        "if verdict.status == 'passed':\n    print('!')\n"
        "verdict.rerun()\nsolution('online_softmax')\nprogress()\n"
        "from course_lib.notebook.figures import show\nshow(1, alt='x')"
    )


@habit()
def the_chapter_for_comparison(notebook: Notebook) -> None:
    """It is not there in the official grade. A cell that only compares loses nothing."""
    notebook.first(
        "from course_lib.flash_attention import flash_attention\n"
        "theirs = flash_attention(*torch.randn(3, 1, 1, 8, 8))"
    )


@habit()
def a_cell_that_raises(notebook: Notebook) -> None:
    notebook.first("1 / 0").first("assert False, 'not yet'").first("raise SystemExit")
    notebook.first("exit()").first("quit()").first("import sys\nsys.exit(3)")
    notebook.first("raise KeyboardInterrupt").first("print(undefined_name)")
    notebook.first("class Odd(Exception):\n    def __str__(self): 1 / 0\nraise Odd")


@habit(notes=("Cell 3 was left out",))
def a_cell_that_kills_the_kernel(notebook: Notebook) -> None:
    notebook.first("import os\nos._exit(1)")


@habit(notes=("Cell 3 was left out",))
def a_cell_without_an_end(notebook: Notebook) -> None:
    notebook.first("step = 0\nwhile True:\n    step += 1")


@habit(passes=without("bytes_moved"), fails={"bytes_moved": ("timeout", "")})
def an_answer_without_an_end(notebook: Notebook) -> None:
    notebook.write("bytes_moved", "def bytes_moved(*args):\n    while True:\n        pass")


@habit()
def a_question_to_the_user(notebook: Notebook) -> None:
    notebook.first("name = input('Your name? ')")
    notebook.first("import getpass\ngetpass.getpass()")
    notebook.first("breakpoint()")


@habit()
def no_network(notebook: Notebook) -> None:
    notebook.first(
        "import urllib.request\nurllib.request.urlopen('https://example.org', timeout=5).read()\n"
    )
    notebook.first("from google.colab import drive\ndrive.mount('/content/drive')")


@habit()
def files_and_processes(notebook: Notebook) -> None:
    """Its own files, a subprocess, workers of a data loader."""
    notebook.first(
        "import pathlib, subprocess, sys\n"
        "pathlib.Path('notes.txt').write_text('x')\n"
        "assert pathlib.Path('notes.txt').read_text() == 'x'\n"
        "torch.save(torch.ones(3), 'ones.pt')\n"
        "subprocess.run([sys.executable, '-c', 'print(1)'], check=True)\n"
        "LARGEST = 65504"
    )
    notebook.write("overflow_score", "overflow_score = math.log(LARGEST)")
    notebook.last(
        "from torch.utils.data import DataLoader\n"
        "for batch in DataLoader(range(8), batch_size=2, num_workers=2):\n    pass"
    )


@habit()
def top_level_await(notebook: Notebook) -> None:
    notebook.write(
        "overflow_score",
        "import asyncio\nawait asyncio.sleep(0)\noverflow_score = math.log(65504)",
    )


@habit()
def global_settings_of_torch(notebook: Notebook) -> None:
    notebook.last(
        "torch.set_default_dtype(torch.float64)\ntorch.set_grad_enabled(False)\n"
        "torch.manual_seed(0)\ntorch.use_deterministic_algorithms(True)\n"
        "torch.set_printoptions(precision=3)\ntorch.set_num_threads(4)\n"
        "torch.set_default_device('cpu')\n"
        "import random, numpy as np\nrandom.seed(0)\nnp.random.seed(0)\nnp.seterr(all='raise')"
    )


# How it was saved.


@habit()
def saved_with_outputs_on_windows(notebook: Notebook) -> bytes:
    for number, cell in enumerate(notebook.cells):
        if cell["cell_type"] == "code":
            cell["outputs"] = [{"output_type": "stream", "name": "stdout", "text": ["1\r\n"]}]
            cell["execution_count"] = number
            cell["source"] = "".join(cell["source"]).replace("\n", "\r\n")
    text = json.dumps(notebook.content, indent=1).replace("\n", "\r\n")
    return b"\xef\xbb\xbf" + text.encode()


@habit(file=f"{SLUG}.py")
def a_script_in_percent_format(notebook: Notebook) -> bytes:
    lines = []
    for cell in notebook.cells:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            lines += ["# %%", text, ""]
        else:
            lines += ["# %% [markdown]", *(f"# {line}" for line in text.splitlines()), ""]
    return "\n".join(lines).encode()


@habit(notes=("Left out, since they hold no text: cells 2.",))
def an_empty_entry(notebook: Notebook) -> None:
    notebook.cells.insert(1, None)  # type: ignore[arg-type]
