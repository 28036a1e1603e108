"""`course_lib` as a submission sees it while it is graded.

The names that a notebook uses are all here. Those that show, check or remember do nothing; Triton
kernels run under the interpreter, as they do in the notebook on a machine without a GPU. Chapters,
solutions and tests are not here at all.

This file is mounted as `course_lib/__init__.py` beside the real `course_lib.runtime`; it is never
imported where it stands.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from course_lib.runtime.interpreter import interpreted

__all__ = ["__version__", "check", "hint", "interpreted", "progress", "setup", "solution"]
__version__ = "0"


class Inert:
    """Anything that a notebook only shows: it can be called, asked for attributes, and printed."""

    def __call__(self, *args: Any, **kwargs: Any) -> Inert:
        """Do nothing."""
        return self

    def __getattr__(self, name: str) -> Inert:
        # Dunder lookups are questions that Python and its libraries ask; the honest answer is no.
        if name.startswith("__") or name.startswith("_repr_") or name.startswith("_ipython_"):
            raise AttributeError(name)
        return self

    def __getitem__(self, key: Any) -> Inert:
        return self

    def __iter__(self) -> Any:
        return iter(())

    def __enter__(self) -> Inert:
        return self

    def __exit__(self, *exception: Any) -> None:
        return None

    def __repr__(self) -> str:
        return ""


def setup(chapter: str = "", **options: Any) -> Inert:
    """As in a notebook on a machine without a GPU: kernels run under the interpreter."""
    import torch

    from course_lib.runtime.interpreter import interpret_everywhere
    from course_lib.runtime.tile import HAS_TRITON

    if HAS_TRITON and not torch.cuda.is_available():
        interpret_everywhere()
    return Inert()


check = hint = solution = progress = Inert()


def __getattr__(name: str) -> Any:
    if name == "interpreted":
        from course_lib.runtime.interpreter import interpreted

        return interpreted
    raise AttributeError(f"module {__name__!r} has no attribute {name!r} while it is graded")


class _InertModule(types.ModuleType):
    """A module of `course_lib.notebook`: every public name in it is inert."""

    def __getattr__(self, name: str) -> Inert:
        if name.startswith("__"):
            raise AttributeError(name)
        return Inert()


class _InertModules(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds the labs, figures and cards of `course_lib.notebook`, all inert."""

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Answer for `course_lib.notebook` and what is below it."""
        if fullname.startswith("course_lib.notebook"):
            return importlib.machinery.ModuleSpec(fullname, self, is_package=True)
        return None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """An empty module that has every name."""
        return _InertModule(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        """Run nothing."""


sys.meta_path.append(_InertModules())
