"""The text of the first code cell of every notebook, kept in this one place.

On Colab it installs the course where it is missing: from the repository, or from a wheel that the
learner uploaded. It never touches torch, Triton or NumPy, which Colab's image pairs with its GPU
driver. Everywhere else it does nothing.
"""

from __future__ import annotations

import json

# Small packages that Colab's image may lack. torch, triton and numpy must never stand here.
SMALL_PACKAGES = ("anywidget", "psygnal", "platformdirs", "safetensors")

_TEXT = """\
# On Colab, this installs the course if it is missing. Everywhere else it does nothing.
from importlib import invalidate_caches
from importlib.util import find_spec

if find_spec("google") and find_spec("google.colab") and not find_spec("course_lib"):
    import subprocess
    import sys
    from glob import glob

    repository = @REPOSITORY@
    course = sorted(glob("course_lib-*.whl"))[-1:] or [f"git+{repository}"]
    if course == ["git+"]:
        raise FileNotFoundError("Upload course_lib-….whl in the Files panel, then run this again.")
    small = @PACKAGES@
    missing = [name for name in small if not find_spec(name)]
    # --no-deps: the torch, Triton and NumPy of this machine stay as they are.
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *course, *missing]
    subprocess.run(command, check=True)
    invalidate_caches()
"""


def bootstrap_text(repository: str) -> str:
    """The bootstrap for a course that lives at `repository`.

    Args:
        repository: Such as "https://github.com/owner/name"; empty where there is none.
    """
    text = _TEXT.replace("@REPOSITORY@", json.dumps(repository))
    return text.replace("@PACKAGES@", json.dumps(SMALL_PACKAGES)).rstrip()


def colab_badge(repository: str, path: str) -> str:
    """A Markdown badge that opens the notebook on Colab, or "" where no repository is set.

    Args:
        repository: Such as "https://github.com/owner/name".
        path: The notebook's path in the repository.

    Raises:
        ValueError: If the repository is not on GitHub, the only host that Colab opens.
    """
    if not repository:
        return ""
    prefix = "https://github.com/"
    name = repository.removeprefix(prefix).removesuffix(".git").strip("/")
    if not repository.startswith(prefix) or name.count("/") != 1:
        raise ValueError(
            f"[tool.course] repository in pyproject.toml is {repository!r}; "
            f"expected {prefix}owner/name, or an empty text."
        )
    link = f"https://colab.research.google.com/github/{name}/blob/main/{path}"
    return f"[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
