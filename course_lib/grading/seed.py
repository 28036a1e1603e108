"""The secret seed of an output folder: drawn once, kept from everybody but its owner."""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
from pathlib import Path

SEED_BYTES = 32
_FORMAT = f"{2 * SEED_BYTES} hexadecimal digits in one line, as `course grade` writes them"


class SeedError(ValueError):
    """A file of a seed cannot be used. The message says why."""


def folders_seed(out: Path, given: Path | None = None) -> bytes:
    """The seed of an output folder: the one it has, else the given one, else a new one.

    Args:
        out: The folder; it exists.
        given: A file with a seed, to grade again as another folder was graded.

    Raises:
        SeedError: If a seed cannot be read or written, or the folder has another one than is given.
    """
    file = out / "seed"
    wanted = read_seed(given) if given is not None else None
    seed = wanted or secrets.token_bytes(SEED_BYTES)
    if not file.exists():
        _write(file, seed)
    # Read back also what was just written: another run may have been first.
    found = read_seed(file)
    if wanted is not None and found != wanted:
        raise SeedError(
            f"{out} was begun with another seed ({seed_id(found)}) than that of {given} "
            f"({seed_id(wanted)}). Choose another --out."
        )
    return found


def read_seed(file: Path) -> bytes:
    """The seed in a file.

    Raises:
        SeedError: If it cannot be read or is none.
    """
    try:
        text = file.read_text(encoding="ascii").strip()
        seed = bytes.fromhex(text)
    except OSError as error:
        raise SeedError(f"{file}: {error.strerror}") from None
    except ValueError:
        raise SeedError(f"{file} holds no seed; expected {_FORMAT}.") from None
    if len(seed) != SEED_BYTES:
        raise SeedError(f"{file} holds {len(seed)} bytes of a seed; expected {_FORMAT}.")
    return seed


def seed_id(seed: bytes) -> str:
    """A name for the seed that does not give it away."""
    return hashlib.sha256(b"course grade: seed\0" + seed).hexdigest()[:16]


def _write(file: Path, seed: bytes) -> None:
    """Write it with mode 0600, whole or not at all; where one stands already, that one stays."""
    draft = file.with_name(f".seed.{os.getpid()}")
    try:
        with contextlib.suppress(FileNotFoundError):
            draft.unlink()
        handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w", encoding="ascii") as opened:
            opened.write(seed.hex() + "\n")
            opened.flush()
            os.fsync(opened.fileno())
        with contextlib.suppress(FileExistsError):
            os.link(draft, file)
        draft.unlink()
    except OSError as error:
        raise SeedError(f"{file} cannot be written: {error.strerror}") from None
