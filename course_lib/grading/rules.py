"""What a submission's text proves, without running it.

A rule here decides points, so it claims only what stands in the text: that code on the path of an
answer names a forbidden operator of PyTorch, or that a kernel's answer never launches a kernel of
its own. Code can hide from it (`getattr`, `exec`); the operators that ran are counted in the child,
and that is a finding for a person.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass

from course_lib.grading.cells import Cell

_MODULES = ("torch",)
"""Packages whose functions are operators."""

_LOOKS_UP = ("eval", "exec", "getattr", "globals", "locals", "vars", "__import__")

_ALSO = {
    "softmax": ("softmin", "Softmax", "Softmax2d", "Softmin"),
    "log_softmax": ("LogSoftmax",),
    "scaled_dot_product_attention": ("MultiheadAttention", "multi_head_attention_forward"),
}
"""Names that reach an operator under another name."""


_INNARDS = frozenset(
    [
        "__closure__",
        "cell_contents",
        "__globals__",
        "_getframe",
        "currentframe",
        "f_back",
        "f_locals",
        "f_globals",
        "tb_frame",
        "__traceback__",
        "get_objects",
        "get_referrers",
        "get_referents",
        "settrace",
        "setprofile",
        "__subclasses__",
    ]
)
"""Names by which code looks at what runs it. No exercise needs one."""

_OURS = "course_lib"
"""The package whose parts a submission has no reason to replace."""


@dataclass(frozen=True)
class Place:
    """Where something stands: its cell, its line there, and the line's text."""

    cell: int
    line: int
    text: str

    def __str__(self) -> str:
        return f"cell {self.cell}, line {self.line}: `{self.text[:120]}`"


@dataclass(frozen=True)
class _Definition:
    cell: Cell
    node: ast.stmt


class Notebook:
    """The top level of all cells: which name is defined where, and what `torch` is called."""

    def __init__(self, cells: list[Cell]) -> None:
        self.cells = cells
        self.definitions: dict[str, list[_Definition]] = {}
        # A name in the notebook to the dotted name that it was imported as.
        self.imported: dict[str, str] = {}
        self.own_members: set[str] = set()
        for cell in cells:
            if cell.tree is None:
                continue
            for statement in _top_level(cell.tree.body):
                for name in _defined_by(statement):
                    self.definitions.setdefault(name, []).append(_Definition(cell, statement))
            for node in _walk(cell.tree):
                self._note(node)

    def _note(self, node: ast.AST) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.split(".")[0]
                self.imported[local] = alias.name if alias.asname else local
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                self.imported[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.ClassDef):
            members = (each for each in node.body if isinstance(each, ast.FunctionDef))
            self.own_members.update(member.name for member in members)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            self.own_members.add(node.attr)

    def places(self, name: str) -> list[Place]:
        """Where a name is defined at top level, the last one last."""
        return [_place(each.cell, each.node) for each in self.definitions.get(name, [])]

    def forbidden(self, name: str, operators: tuple[str, ...]) -> tuple[str, Place] | None:
        """The first forbidden operator on the path of an answer, and where it stands."""
        names = {alias: operator for operator in operators for alias in _names_of(operator)}
        if not names:
            return None
        for cell, node in self._reached(name):
            called = self._operator(node)
            if called in names:
                return names[called], _place(cell, node)
        return None

    def may_launch(self, name: str) -> bool:
        """Whether code on the path of an answer may launch a kernel that stands in the notebook.

        A launch is `kernel[grid](…)` or `kernel.run(…)`; a kernel has a decorator that names `jit`.
        It may be anywhere where the answer is no plain function, or looks up names as it runs.
        """
        definitions = self.definitions.get(name, [])
        if not definitions or not isinstance(definitions[-1].node, ast.FunctionDef):
            return True
        kernels, launches = False, False
        for _, node in self._reached(name, everything=True):
            if isinstance(node, ast.Name) and node.id in _LOOKS_UP:
                return True
            if isinstance(node, ast.FunctionDef):
                kernels |= any(map(_names_jit, node.decorator_list))
            if isinstance(node, ast.Call):
                function = node.func
                launches |= isinstance(function, ast.Subscript)
                launches |= isinstance(function, ast.Attribute) and function.attr == "run"
            # `launch = kernel[grid]` and then `launch(…)`.
            launches |= isinstance(node, ast.Assign) and isinstance(node.value, ast.Subscript)
            if kernels and launches:
                return True
        return False

    def looks_around(self, name: str) -> Place | None:
        """Where code on the path of an answer, or a cell as it runs, reaches for what runs it.

        That is a look at frames, closures or the garbage collector, an attribute or a piece of code
        whose name is put together as it runs, or an assignment into the course's own modules. None
        of it proves anything, so it is for a person to read.
        """
        for cell, node in self._reached(name):
            if _reaches_in(node) or self._replaces_ours(node):
                return _place(cell, node)
        for cell in self.cells:
            for node in _walk(cell.tree) if cell.tree is not None else ():
                if self._replaces_ours(node):
                    return _place(cell, node)
        return None

    def _replaces_ours(self, node: ast.AST) -> bool:
        """`measure.measure_memory = …`, where `measure` is a module of the course."""
        if not (isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)):
            return False
        base = _dotted(node.value)
        return self.imported.get(base.split(".")[0], "").split(".")[0] == _OURS

    def is_readable(self) -> bool:
        """Whether every cell could be parsed; where not, something may stand in the others."""
        return all(cell.tree is not None for cell in self.cells)

    def _reached(self, name: str, *, everything: bool = False) -> Iterator[tuple[Cell, ast.AST]]:
        """Every node of the last definition of a name, and of what it calls in turn.

        A name that is bound inside a function is that function's own, whatever the notebook calls
        by it elsewhere. Of the notebook's variables only those that are called are followed, since
        how a number was computed beforehand is not on the path of the answer; `everything` follows
        the others too, where the absence of something is to be shown.
        """
        seen, waiting = {name}, [name]
        while waiting:
            for definition in self.definitions.get(waiting.pop(), [])[-1:]:
                for node, own in _with_own_names(definition.node, frozenset()):
                    yield definition.cell, node
                    for each in _followed(node, own):
                        if each not in seen and (everything or self._is_code(each, node)):
                            seen.add(each)
                            waiting.append(each)

    def _is_code(self, name: str, node: ast.AST) -> bool:
        """Whether what a name stands for runs when this node does."""
        last = self.definitions.get(name, [None])[-1]
        if last is None or isinstance(node, ast.Call):
            return last is not None
        return not isinstance(last.node, ast.Assign | ast.AnnAssign | ast.AugAssign)

    def _operator(self, node: ast.AST) -> str:
        """The last part of the name of PyTorch's operator that a node names, or ""."""
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            full = self.imported.get(node.id, "") if node.id not in self.definitions else ""
            return full.split(".")[-1] if full.split(".")[0] in _MODULES else ""
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            base = _dotted(node.value)
            root = base.split(".")[0]
            full = self.imported.get(root, "")
            if full:
                # `torch.softmax`, `F.softmax`; and not `scipy.special.softmax`.
                return _part(node.attr, base) if full.split(".")[0] in _MODULES else ""
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            method = node.func.attr
            root = _dotted(node.func.value).split(".")[0]
            # `scores.softmax(-1)`: a tensor's method, unless something of theirs is called so.
            if root not in self.imported and method not in self.own_members:
                return method
        return ""


def _reaches_in(node: ast.AST) -> bool:
    if isinstance(node, ast.Attribute | ast.Name):
        return (node.attr if isinstance(node, ast.Attribute) else node.id) in _INNARDS
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name)):
        return False
    if node.func.id == "getattr":
        return len(node.args) > 1 and not isinstance(node.args[1], ast.Constant)
    return node.func.id in ("eval", "exec", "__import__")


def _names_jit(decorator: ast.AST) -> bool:
    parts = (getattr(each, "id", getattr(each, "attr", "")) for each in _walk(decorator))
    return any("jit" in part for part in parts)


def _with_own_names(node: ast.AST, own: frozenset[str]) -> Iterator[tuple[ast.AST, frozenset[str]]]:
    """Every node below one, with the names that are bound by the functions around it."""
    waiting = [(node, own)]
    while waiting:
        here, names = waiting.pop()
        if isinstance(here, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            names = names | _bound_in(here)
        yield here, names
        waiting += [(child, names) for child in _children(here)]


def _walk(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below one, like `ast.walk` and three times as fast: it is half of our own time."""
    waiting = [node]
    while waiting:
        here = waiting.pop()
        yield here
        waiting += _children(here)


def _children(node: ast.AST) -> list[ast.AST]:
    found: list[ast.AST] = []
    for value in node.__dict__.values():
        if type(value) is list:
            found += [each for each in value if isinstance(each, ast.AST)]
        # `Load()` and its like hold nothing, and stand at every name.
        elif isinstance(value, ast.AST) and value._fields:
            found.append(value)
    return found


def _bound_in(function: ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) -> frozenset[str]:
    """Parameters and assigned names of a function, those of functions inside it included."""
    bound, not_own = set(), set()
    for node in _walk(function):
        if isinstance(node, ast.arg):
            bound.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            bound.add(node.id)
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node is not function:
            bound.add(node.name)
        elif isinstance(node, ast.Global):
            not_own.update(node.names)
    return frozenset(bound - not_own)


def _followed(node: ast.AST, own: frozenset[str]) -> list[str]:
    """The names of the notebook that a node refers to."""
    if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        return [] if node.id in own else [node.id]
    if isinstance(node, ast.Call):
        parts = [node.func, *node.args, *(each.value for each in node.keywords)]
        if isinstance(node.func, ast.Subscript):
            parts.append(node.func.value)
        return [each.id for each in parts if isinstance(each, ast.Name) and each.id not in own]
    return []


def _part(attribute: str, base: str) -> str:
    """`torch.ops.aten._softmax.default` names its operator one step before the end."""
    last = base.split(".")[-1]
    return last if attribute in ("default", "out", "int") and ".ops." in f".{base}." else attribute


def _names_of(operator: str) -> set[str]:
    """The names by which Python code calls an operator such as "aten::_softmax"."""
    bare = operator.split("::")[-1]
    public = bare.lstrip("_").removesuffix("_")
    return {bare, public, f"{public}_", f"_{public}", *_ALSO.get(public, ())}


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Statements that run when the cell does, also inside `if`, `for`, `with` and `try`."""
    for statement in body:
        yield statement
        for block in ("body", "orelse", "finalbody"):
            if not isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                yield from _top_level(getattr(statement, block, []))
        for handler in getattr(statement, "handlers", []):
            yield from _top_level(handler.body)


def _defined_by(statement: ast.stmt) -> Iterator[str]:
    if isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
        return
    targets: list[ast.expr] = []
    if isinstance(statement, ast.Assign):
        targets = statement.targets
    elif isinstance(statement, ast.AnnAssign | ast.AugAssign):
        targets = [statement.target]
    for target in targets:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def _dotted(node: ast.AST) -> str:
    """`a.b.c` as text; "" for anything else."""
    parts = []
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    return ".".join([node.id, *reversed(parts)]) if isinstance(node, ast.Name) else ""


def _place(cell: Cell, node: ast.AST) -> Place:
    line = getattr(node, "lineno", 0)
    return Place(cell.number, line, cell.line(line))
