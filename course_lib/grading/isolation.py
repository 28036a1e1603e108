"""Run a learner's answer so that neither it nor the notebook around it disturbs the other."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Iterator

import torch


class Printed(io.TextIOBase):
    """What an answer printed: the last part of it, however much there was.

    Args:
        limit: How many characters are kept.
    """

    def __init__(self, limit: int = 2000) -> None:
        self.limit, self.text, self.dropped = limit, "", False

    def writable(self) -> bool:
        """It takes text."""
        return True

    def write(self, text: str) -> int:
        """Keep the end of all that was written."""
        self.text += text
        if len(self.text) > 2 * self.limit:
            self.text, self.dropped = self.text[-self.limit :], True
        return len(text)

    def __str__(self) -> str:
        return ("…" if self.dropped else "") + self.text[-self.limit :].rstrip()


@contextlib.contextmanager
def isolated(seed: int = 0) -> Iterator[Printed]:
    """Pin what an earlier cell may have changed, and undo what the answer changes.

    Default dtype float32, default device CPU, gradients on, random numbers from `seed`. Prints go
    to the object that is yielded. Numerical warnings of wrong answers are kept off the page.
    """
    dtype = torch.get_default_dtype()
    printed = Printed()
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.device("cpu"))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(contextlib.redirect_stdout(printed))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", RuntimeWarning)
        stack.callback(torch.set_default_dtype, dtype)
        torch.set_default_dtype(torch.float32)
        torch.manual_seed(seed)
        yield printed
