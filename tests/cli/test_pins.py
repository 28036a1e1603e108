"""The pins: they install on the oldest Python that is promised, and bring no CUDA by name."""

from __future__ import annotations

import importlib.metadata as metadata
import re
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

DEBIAN_12 = "3.11.2"


def pins(root: Path) -> dict[str, str]:
    lines = (root / "constraints.txt").read_text().splitlines()
    found = [re.fullmatch(r"([A-Za-z0-9._-]+)==(\S+)", line) for line in lines if line[:1] != "#"]
    assert all(found)
    return {canonicalize_name(match[1]): match[2] for match in found if match}


def test_pins_are_plain(root: Path):
    for name, version in pins(root).items():
        assert "+" not in version
        assert not name.startswith(("nvidia", "cuda")), name


def test_what_is_asked_for_is_pinned_inside_its_range(root: Path):
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    for text in [*project["dependencies"], *(text for extra in extras for text in extra)]:
        requirement = Requirement(text)
        version = pins(root)[canonicalize_name(requirement.name)]
        assert version in requirement.specifier, f"{text} is pinned to {version}"


def test_pins_install_on_debian_12(root: Path):
    """Pip would otherwise search for minutes, and end up fetching CUDA on the way."""
    for name, version in pins(root).items():
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        wants = str(distribution.metadata.json.get("requires_python", ""))
        if wants and distribution.version.split("+")[0] == version:
            assert DEBIAN_12 in SpecifierSet(wants), f"{name}=={version} needs Python {wants}"
