"""Where submissions stand: files, folders and zips, and whose each of them is.

Folders and zips come from students. No link is followed, no device or pipe is opened, nothing is
unpacked to disk, and what one student hands in cannot spoil the reading of the others.
"""

from __future__ import annotations

import csv
import functools
import io
import os
import re
import stat
import zipfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from course_lib.grading.submission import (
    LARGEST_FILE,
    Submission,
    UnreadableError,
    check_size,
    parse,
)

MOST_NOTEBOOKS = 50
"""Most submissions in one student's folder or zip."""
MOST_FILES = 10_000
"""Most files in one student's folder or zip."""
LARGEST_DIRECTORY = 8 * 2**20
"""Most bytes in a zip's table of contents: about 100,000 files."""
LARGEST_UNPACKED = 4 * 2**30
"""Most bytes of all notebooks of one zip together."""
HIGHEST_RATIO = 200
"""Notebooks shrink to a tenth or a fiftieth. What shrinks more than this is no notebook."""

OTHER_ARCHIVES = (".7z", ".bz2", ".gz", ".rar", ".tar", ".tgz", ".xz", ".zst")
_CHAPTERS_FILE = re.compile(r"\d\d_[a-z][a-z0-9_]*", re.ASCII)
_NOT_REGULAR = "It is not a regular file: a link, a pipe, a device or a folder."


class PathsError(ValueError):
    """What was asked for cannot be used: a path, or the list of students."""


@dataclass(frozen=True)
class Source:
    """One thing that was handed in: whose it is, and how to read it.

    Attributes:
        name: Where it stands, relative to the path that was asked for.
        student: From the list of students, else from the folder's, the zip's or the file's name.
        load: Gives its bytes, or raises `UnreadableError`.
        listed: Whether the list of students has it.
    """

    name: str
    student: str
    load: Callable[[], bytes] = field(repr=False)
    listed: bool = False

    def read(self) -> Submission:
        """Read it. Never raises, and never waits for a file that has no end."""
        try:
            data = self.load()
        except UnreadableError as error:
            return Submission(self.name, "", status="unreadable", reason=str(error))
        return parse(self.name, data)


def find_submissions(paths: Iterable[Path], students: dict[str, str] | None = None) -> list[Source]:
    """Everything that was handed in below some paths.

    A notebook stands alone, in a folder of any depth, or in a zip; in a folder, a zip stands for a
    student. Scripts count where they are named like a chapter (`08_flash_attention.py`) or asked
    for by name. Hidden files, checkpoints and other files are passed over. What looks like a
    submission and cannot be one (a link, a device, a zip in a zip) is found too, and says why when
    it is read; so is a student's folder without any notebook.

    Whose it is comes from `students`, else from the outermost folder below the path, else from the
    zip's name, else from the file's name; a file that is named like a chapter takes the name of
    the folder or zip around it.

    Args:
        paths: Notebooks, folders, zips.
        students: From `read_students`.

    Raises:
        PathsError: If a path does not exist or holds nothing that could be graded.
    """
    found: list[Source] = []
    for path in paths:
        try:
            # What the instructor names may be a link; what stands below it may not.
            real = path.resolve(strict=True)
            here = list(_below(real))
        except (OSError, RuntimeError) as error:
            why = getattr(error, "strerror", None) or str(error)
            raise PathsError(f"{path}: {why}") from None
        if not here:
            raise PathsError(f"{path} holds no notebook (.ipynb), in no folder and in no zip.")
        found += here
    return [_with_student(each, students) for each in _with_own_names(found)]


def read_students(path: Path) -> dict[str, str]:
    """The list of students: a CSV with a heading line and two columns.

    `submission` is the folder, the zip or the file as it stands below the path that is graded
    ("s1042", "s1042.zip", "s1042/08_flash_attention.ipynb"); `student` is who handed it in. Further
    columns are passed over.

    Returns:
        Student by submission.

    Raises:
        PathsError: If it cannot be read; the message says in which line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise PathsError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise PathsError(f"{path} is not in UTF-8: {error.reason}, byte {error.start}.") from None
    rows = csv.DictReader(io.StringIO(text, newline=""), skipinitialspace=True)
    students: dict[str, str] = {}
    try:
        columns = rows.fieldnames or []
        if not {"submission", "student"} <= set(columns):
            had = ", ".join(columns) or "nothing"
            raise PathsError(
                f"{path}: the first line names the columns {had}; expected submission and student."
            )
        for row in rows:
            key = (row["submission"] or "").strip().strip("/")
            student = (row["student"] or "").strip()
            where = f"{path}, line {rows.line_num}"
            if not key or not student:
                raise PathsError(f"{where}: submission or student is empty.")
            if students.setdefault(key, student) != student:
                raise PathsError(f"{where}: {key!r} is of {students[key]!r} and of {student!r}.")
    except csv.Error as error:
        raise PathsError(f"{path}, line {rows.line_num}: {error}") from None
    return students


def _with_student(source: Source, students: dict[str, str] | None) -> Source:
    """Whose it is by the list: by the whole name, by its beginning, or by one part of it."""
    parts = PurePosixPath(source.name).parts
    keys = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
    keys += [key for part in parts for key in (part, PurePosixPath(part).stem)]
    student = next((students[key] for key in keys if key in students), None) if students else None
    return replace(source, student=student, listed=True) if student else source


def _with_own_names(sources: list[Source]) -> list[Source]:
    """Number the names that occur more than once: two paths may hold files of one name."""
    taken: set[str] = set()
    named = []
    for source in sources:
        name, number = source.name, 1
        while name in taken:
            number += 1
            name = f"{source.name} ({number})"
        taken.add(name)
        named.append(replace(source, name=name))
    return named


def _below(path: Path) -> list[Source]:
    """The submissions of one path that the instructor named."""
    if path.is_dir():
        return list(_in_folder(path))
    if _kind(path.name) == "zip":
        return list(_in_class_zip(path))
    # Two parts of the path, so that `course grade class/*/08_….ipynb` tells its files apart.
    name = "/".join(path.parts[-2:]).lstrip("/")
    return [_file(path, name, _owner("", path.name, path.parent.name))]


def _owner(folder: str, name: str, around: str) -> str:
    """Whose a file is: its outermost folder's name, else its own, else that of what it lies in."""
    stem = PurePosixPath(name).stem
    return _shown(folder or (around if around and _CHAPTERS_FILE.fullmatch(stem) else stem))


def _in_folder(root: Path) -> Iterator[Source]:
    for entry in _entries(root):
        if entry.is_dir(follow_symlinks=False):
            yield from _students_folder(root, entry.name)
        else:
            owner = _owner("", entry.name, root.name)
            yield from _in_place(Path(entry.path), entry.name, owner)


def _students_folder(root: Path, folder: str) -> list[Source]:
    """Everything in one folder of the class; of one with nothing in it, a sentence on that."""
    waiting, seen, others = [root / folder], 0, []
    found: list[Source] = []
    owner = _shown(folder)
    while waiting:
        try:
            entries = _entries(waiting.pop())
        except OSError as error:
            return [*found, _refused(folder, owner, f"It cannot be read: {error.strerror}.")]
        seen += len(entries)
        if seen > MOST_FILES:
            reason = f"The folder holds more than {MOST_FILES:,} files."
            return [_refused(folder, owner, reason)]
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                waiting.append(Path(entry.path))
                continue
            path = Path(entry.path)
            here = list(_in_place(path, path.relative_to(root).as_posix(), owner))
            found += here
            others += [] if here else [_shown(entry.name)]
    if len(found) > MOST_NOTEBOOKS:
        return [_refused(folder, owner, f"The folder holds {len(found):,} notebooks.")]
    if others and not found:
        but = ", ".join(sorted(others)[:3])
        return [_refused(folder, owner, f"The folder holds no notebook (.ipynb), but {but}.")]
    return sorted(found, key=lambda source: source.name)


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    """What stands in a folder, by name, without hidden things and those that systems add."""
    with os.scandir(folder) as entries:
        return sorted((e for e in entries if not _is_hidden(e.name)), key=lambda e: e.name)


def _in_place(path: Path, name: str, owner: str) -> Iterator[Source]:
    """What one file of a folder stands for: a submission, several (a zip), or none."""
    kind = _kind(name)
    if path.is_symlink():
        # A link to a folder may be all that a student has; any other one is nobody's notebook.
        if kind or os.path.isdir(path):
            yield _refused(name, owner, "It is a symbolic link. Links are not followed.")
    elif kind == "zip":
        yield from _in_students_zip(path, name, owner)
    elif kind == "archive":
        yield _refused(name, owner, "This kind of archive is not opened. Hand in a zip.")
    elif kind:
        yield _file(path, name, owner)


def _kind(name: str) -> str:
    """What a file is by its name: "notebook", "script", "zip", "archive", or "" for the rest."""
    path = PurePosixPath(name.lower())
    if path.suffix == ".py":
        return "script" if _CHAPTERS_FILE.match(path.stem) else ""
    kinds = {".ipynb": "notebook", ".zip": "zip", **dict.fromkeys(OTHER_ARCHIVES, "archive")}
    return kinds.get(path.suffix, "")


def _is_hidden(name: str) -> bool:
    return (name.startswith(".") and name != "..") or name in ("__MACOSX", "__pycache__")


def _file(path: Path, name: str, owner: str) -> Source:
    return Source(_shown(name), owner, lambda: _regular_bytes(path))


def _refused(name: str, owner: str, reason: str) -> Source:
    def load() -> bytes:
        raise UnreadableError(reason)

    return Source(_shown(name), owner, load)


def _regular_bytes(path: Path) -> bytes:
    """The bytes of a regular file of bearable size. Opens no device, pipe or link."""
    # Not to wait: opening a pipe that nobody writes to would never return. Windows has neither.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    flags |= getattr(os, "O_BINARY", 0)
    try:
        # Opening alone does something to some devices, so look first, and at what was opened too.
        if not stat.S_ISREG(os.lstat(path).st_mode):
            raise UnreadableError(_NOT_REGULAR)
        with os.fdopen(os.open(path, flags), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise UnreadableError(_NOT_REGULAR)
            check_size(status.st_size)
            data = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise UnreadableError(f"The file cannot be read: {error.strerror}.") from None
    check_size(len(data))
    return data


# Zips.


def _in_class_zip(path: Path) -> list[Source]:
    """A zip that the instructor named: the folders in it are students'.

    One folder around everything is what packing programs add, and is nobody's.
    """
    members = _members(path)
    if isinstance(members, str):
        return [_refused(path.name, _shown(path.stem), members)]
    tops = {name.split("/")[0] if "/" in name else "" for name in members}
    tops = {top for top in tops if not _is_hidden(top)}
    wrapper = f"{tops.pop()}/" if len(tops) == 1 else ""
    owners = {}
    for name in members:
        folder, _, rest = name.removeprefix(wrapper).partition("/")
        owners[name] = _owner(folder if rest else "", name, path.stem)
    return _from_zip(path, path.name, members, owners)


def _in_students_zip(path: Path, name: str, owner: str) -> list[Source]:
    """A zip in a folder: all of it is one student's."""
    members = _members(path)
    if isinstance(members, str):
        return [_refused(name, owner, members)]
    if len(members) > MOST_FILES:
        return [_refused(name, owner, f"The zip holds more than {MOST_FILES:,} files.")]
    found = _from_zip(path, name, members, dict.fromkeys(members, owner))
    if len(found) > MOST_NOTEBOOKS:
        return [_refused(name, owner, f"The zip holds {len(found):,} notebooks.")]
    return found or [_refused(name, owner, "The zip holds no notebook (.ipynb).")]


def _from_zip(
    path: Path, label: str, members: dict[str, zipfile.ZipInfo], owners: dict[str, str]
) -> list[Source]:
    found, unpacked = [], 0
    for name, info in sorted(members.items()):
        if not _kind(name) or any(_is_hidden(part) for part in name.split("/")):
            continue
        unpacked += info.file_size
        if reason := _refusal(name, info, unpacked):
            found.append(_refused(f"{label}/{name}", owners[name], reason))
            continue

        def load(info: zipfile.ZipInfo = info) -> bytes:
            return _member_bytes(path, info)

        found.append(Source(_shown(f"{label}/{name}"), owners[name], load))
    return found


def _members(path: Path) -> dict[str, zipfile.ZipInfo] | str:
    """The files of a zip by name, or why it cannot be read. Of two with one name, the last."""
    try:
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return _NOT_REGULAR
        _check_directory(path)
        infos = _archive(path, path.stat().st_mtime_ns).infolist()
    except UnreadableError as error:
        return str(error)
    except OSError as error:
        return f"The zip cannot be read: {error.strerror or error}."
    except Exception as error:
        # zipfile raises many kinds of errors on files that are made to harm.
        return f"It is not a sound zip: {error}."
    # Some Windows programs write backslashes.
    named = {info.filename.replace("\\", "/"): info for info in infos}
    return {name: info for name, info in named.items() if not name.endswith("/")}


@functools.lru_cache(maxsize=4)
def _archive(path: Path, _changed: int) -> zipfile.ZipFile:
    """A zip, open. A few are kept so: reading a class's table of contents for each file is slow."""
    return zipfile.ZipFile(path)


def _check_directory(path: Path) -> None:
    """Refuse a table of contents that would fill the memory, before zipfile reads it."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 22 - 65_535 - 20))
        tail = file.read()
    # The end record has 22 bytes and a comment; its bytes 12 to 15 are the directory's size.
    at = tail.rfind(b"PK\5\6", 0, max(0, len(tail) - 22 + 4))
    if at < 0:
        raise UnreadableError("It is not a zip, or its end is missing. Was the upload cut short?")
    directory = int.from_bytes(tail[at + 12 : at + 16], "little")
    is_zip64 = tail[max(0, at - 20) : at].startswith(b"PK\6\7")
    if is_zip64 or directory > LARGEST_DIRECTORY:
        raise UnreadableError("The zip holds too many files, or too large ones.")


def _refusal(name: str, info: zipfile.ZipInfo, unpacked: int) -> str:
    """Why a file of a zip is not read, or ""."""
    parts, mode = name.split("/"), info.external_attr >> 16
    if name.startswith("/") or ".." in parts or ":" in parts[0]:
        return "Its name in the zip leads out of the zip's own folder."
    if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
        return "It is a link or a device inside the zip, and not a file."
    if _kind(name) in ("zip", "archive"):
        return "It is an archive inside a zip. Unpack it, and zip the notebooks themselves."
    if info.flag_bits & 0x1:
        return "It is locked with a password."
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return "It is packed by a method that is not read here. Pack the zip with another program."
    try:
        check_size(info.file_size)
    except UnreadableError as error:
        return str(error)
    if info.file_size > 2**20 and info.file_size > HIGHEST_RATIO * max(info.compress_size, 1):
        return f"It unpacks to more than {HIGHEST_RATIO} times its size, as no notebook does."
    if unpacked > LARGEST_UNPACKED:
        return f"The notebooks of this zip unpack to more than {LARGEST_UNPACKED:,} bytes."
    return ""


def _member_bytes(path: Path, info: zipfile.ZipInfo) -> bytes:
    try:
        with _archive(path, path.stat().st_mtime_ns).open(info) as file:
            data = file.read(LARGEST_FILE + 1)
    except Exception as error:
        # As above: a damaged or forged zip fails in many ways.
        raise UnreadableError(f"It cannot be unpacked: {error}.") from None
    check_size(len(data))
    return data


def _shown(name: str, most: int = 200) -> str:
    """A name that can be printed and written anywhere, without control and half characters."""
    text = "".join(each if each.isprintable() else "�" for each in name)
    return text if len(text) <= most else text[: most - 1] + "…"
