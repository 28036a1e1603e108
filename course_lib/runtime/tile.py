"""The only door to Triton.

Every file with a kernel starts with::

    from course_lib.runtime.tile import triton, tl

Triton publishes wheels for Linux only. Elsewhere the two names are stand-ins: a module that
decorates kernels still imports, so its reference, its checks and its figures work, and only a
launch raises :class:`TritonUnavailable`, which says what is missing and what to do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

__all__ = ["HAS_TRITON", "TRITON_MISSING", "TritonUnavailable", "stand_ins", "tl", "triton"]


class TritonUnavailable(RuntimeError):
    """A Triton kernel was launched or called where Triton cannot be imported."""


class _StandInName:
    """Any attribute of ``triton`` or ``tl``: it can be named, subscripted and printed, not used."""

    def __init__(self, name: str, reason: str) -> None:
        self._name = name
        self._reason = reason

    def __getattr__(self, attribute: str) -> _StandInName:
        # Dunder lookups are questions that Python, inspect and copy ask; the honest answer is no.
        if attribute.startswith("__"):
            raise AttributeError(f"{self._name} has no attribute {attribute!r}")
        return _StandInName(f"{self._name}.{attribute}", self._reason)

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        _refuse(f"`{self._name}` was called", self._reason)

    def __repr__(self) -> str:
        return f"<{self._name}: Triton is not installed>"


class _StandInConstexpr:
    """``tl.constexpr``: an annotation in signatures, and a box for a constant elsewhere."""

    def __init__(self, value: Any) -> None:
        self.value = value.value if isinstance(value, _StandInConstexpr) else value

    def __repr__(self) -> str:
        return f"constexpr[{self.value!r}]"


class _StandInKernel:
    """What ``@triton.jit`` makes of a function where there is no Triton."""

    def __init__(self, fn: Callable[..., Any], reason: str) -> None:
        functools.update_wrapper(self, fn)
        self.fn = fn
        self._reason = reason

    def __getitem__(self, grid: object) -> Callable[..., NoReturn]:
        return self.run

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        _refuse(f"kernel `{self.fn.__name__}` was called", self._reason)

    def run(self, *args: object, **kwargs: object) -> NoReturn:
        """Refuse the launch.

        Raises:
            TritonUnavailable: Always.
        """
        _refuse(f"kernel `{self.fn.__name__}` was launched", self._reason)

    def __repr__(self) -> str:
        return f"<kernel {self.fn.__name__}: Triton is not installed>"


class _StandInLanguage(_StandInName):
    """``triton.language``."""

    constexpr = _StandInConstexpr


class _StandInTriton(_StandInName):
    """``triton``: the decorators and the integer helpers that host code uses."""

    def __init__(self, reason: str) -> None:
        super().__init__("triton", reason)
        self.language = _StandInLanguage("tl", reason)
        self.__version__ = None

    def jit(self, fn: Callable[..., Any] | None = None, **options: object) -> Any:
        """Stand in for ``@triton.jit`` and ``@triton.jit(...)``."""
        if fn is None:
            return lambda inner: _StandInKernel(inner, self._reason)
        return _StandInKernel(fn, self._reason)

    def autotune(self, *args: object, **kwargs: object) -> Callable[[Any], Any]:
        """Stand in for ``@triton.autotune``: keep the kernel as it is."""
        return lambda kernel: kernel

    def heuristics(self, values: object) -> Callable[[Any], Any]:
        """Stand in for ``@triton.heuristics``: keep the kernel as it is."""
        return lambda kernel: kernel

    @staticmethod
    def Config(*args: object, **kwargs: object) -> dict[str, object]:
        """Stand in for ``triton.Config``: launch tables are data and may be read without Triton."""
        return {"args": args, **kwargs}

    @staticmethod
    def cdiv(x: int, y: int) -> int:
        """Ceiling division of non-negative integers."""
        return (x + y - 1) // y

    @staticmethod
    def next_power_of_2(n: int) -> int:
        """The smallest power of two that is at least ``n`` (0 for 0, as in Triton)."""
        return 1 << (n - 1).bit_length() if n > 0 else 0


def _refuse(what: str, reason: str) -> NoReturn:
    raise TritonUnavailable(
        f"{what}, but Triton cannot be imported here ({reason}). Triton has wheels for Linux "
        "(x86-64 and ARM): use Linux, WSL 2, Colab or a container, then `pip install triton`. "
        "Everything of the course that does not launch a Triton kernel works here; pass "
        '`implementation="torch"` to an op to stay with PyTorch.'
    )


def stand_ins(reason: str) -> tuple[Any, Any]:
    """Make the pair ``(triton, tl)`` used where Triton is missing.

    Args:
        reason: Why Triton cannot be imported; quoted when a kernel is launched.
    """
    module = _StandInTriton(reason)
    return module, module.language


if TYPE_CHECKING:
    # Triton's own types take every constant of a launch for a mistake (an `int` is no `constexpr`),
    # so a type checker sees two names whose attributes may be anything.
    class _Anything(type):
        def __getattr__(cls, name: str) -> Any: ...

    class triton(metaclass=_Anything):  # noqa: D101
        __version__: str

    class tl(metaclass=_Anything):  # noqa: D101
        class constexpr(Any):  # noqa: D106
            def __init__(self, value: Any) -> None: ...

    HAS_TRITON: bool = True
    TRITON_MISSING: str | None = None
else:
    try:
        import triton
        import triton.language as tl

        HAS_TRITON = True
        TRITON_MISSING = None
    except ImportError as error:
        HAS_TRITON = False
        TRITON_MISSING = str(error)
        triton, tl = stand_ins(TRITON_MISSING)
