"""Whatever students hand in, reading it gives a submission: text, or a reason why not."""

from __future__ import annotations

import ast
import builtins
import hashlib
import json
import os
import socket
import struct
import threading
import zipfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from course_lib.grading import sources
from course_lib.grading.exercise import Chapter
from course_lib.grading.sources import PathsError, find_submissions, read_students
from course_lib.grading.submission import Submission, parse

CHAPTERS = [Chapter("00_start_here", "", ()), Chapter("08_flash_attention", "", ())]
CODE = 'setup("flash_attention")\nx = 1'


def cell(source="x = 1", kind="code", **more) -> dict:
    return {"cell_type": kind, "metadata": {}, "source": source, **more}


def notebook(*cells, **more) -> bytes:
    return json.dumps({"cells": cells, "metadata": {}, "nbformat": 4, **more}).encode()


GOOD = notebook(cell(CODE))


def texts(data: bytes, name: str = "a.ipynb") -> tuple[str, ...]:
    read = parse(name, data)
    assert read.status == "readable", read.reason
    assert read.reason == ""
    assert read.sha256 == hashlib.sha256(data).hexdigest()
    return read.cells


def reason(data: bytes, name: str = "a.ipynb") -> str:
    read = parse(name, data)
    assert read.status == "unreadable"
    assert read.cells == ()
    assert read.sha256 == hashlib.sha256(data).hexdigest()
    return read.reason


# What is in a file.


@pytest.mark.parametrize(
    ("data", "want"),
    [
        (notebook(cell("a"), cell("# b", "markdown"), cell("c")), ("a", "c")),
        (notebook(cell(["a = 1\n", "b = 2"])), ("a = 1\nb = 2",)),
        (notebook(cell("a\r\nb\rc\n")), ("a\nb\nc\n",)),
        (b"\xef\xbb\xbf" + notebook(cell("a")), ("a",)),
        (notebook(cell("é"), more="ü"), ("é",)),
        (notebook(cell("é")).decode().encode("utf-16"), ("é",)),
        (notebook(cell("é")).decode("unicode-escape").encode("utf-16"), ("é",)),
        (json.dumps(json.loads(notebook(cell("a"))), indent=4).replace("\n", "\r\n").encode(), "a"),
        # Lost metadata, and a cell whose kind only its outputs tell.
        (b'{"cells": [{"source": "a", "outputs": []}, {"source": "b"}]}', ("a",)),
        (b'{"cells": [{"cell_type": "code", "source": "a", "metadata": null}]}', ("a",)),
        # Outputs may hold anything, and plotly writes NaN.
        (notebook(cell("a", outputs=[{"data": float("nan")}, None, 3])), ("a",)),
        # Of two lists of one name the last counts, as in Jupyter.
        (b'{"cells": [], "cells": [{"cell_type": "code", "source": "b"}]}', ("b",)),
        (
            b'{"nbformat": 3, "worksheets": [{"cells": [{"cell_type": "code", "input": ["a"]}]},'
            b' {"cells": null}, null, {"cells": [{"cell_type": "code", "input": "b"}]}]}',
            ("a", "b"),
        ),
        # Half a character becomes a sign that says so; two halves are one.
        (b'{"cells": [{"cell_type": "code", "source": "\\ud800x\\ud83d\\ude00"}]}', ("�x😀",)),
        (notebook(cell("%matplotlib inline\n!ls\n<bad python")), None),
        (notebook(cell("a\0b")), ("a\0b",)),
        (notebook(cell(""), cell("a")), ("", "a")),
    ],
)
def test_notebooks_that_can_be_read(data: bytes, want) -> None:
    got = texts(data)
    assert got == (want if isinstance(want, tuple) else got)
    if want is None:
        assert got == ("%matplotlib inline\n!ls\n<bad python",)


def test_cells_without_text_are_left_out_and_named() -> None:
    odd = [None, 3, cell(None), cell(["a", None]), cell({"a": 1}), {"cell_type": "code"}]
    read = parse("a.ipynb", notebook(*odd, cell("good")))
    assert read.cells == ("good",)
    assert read.notes == ("Left out, since they hold no text: cells 1, 2, 3, 4, 5, 6.",)
    many = parse("a.ipynb", notebook(*[None] * 30, cell("good")))
    assert many.notes[0].endswith("9, 10, ….")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"", "The file is empty"),
        (b" \r\n\0\0 ", "The file is empty"),
        (GOOD[:-1], "its JSON breaks in line 1, column"),
        (b"hello", "its JSON breaks in line 1, column 1"),
        (b"[]", "its JSON is a list; expected an object"),
        (b"null", "its JSON is a NoneType"),
        (b'"x"', "its JSON is a str"),
        (b"{}", "it has no list of cells"),
        (b'{"cells": null}', "it has no list of cells"),
        (b'{"cells": {"a": 1}, "worksheets": "x"}', "it has no list of cells"),
        (b'{"worksheets": [null, 3, {"cells": 3}]}', "It has no code cell with text"),
        (notebook(), "It has no code cell with text"),
        (notebook(cell(" \n")), "It has no code cell with text"),
        (notebook(cell("# only prose", "markdown")), "It has no code cell with text"),
        (b"caf\xe9 " + GOOD, "not text in UTF-8: byte 0xe9 at position 3"),
        (b"\xff\xfeab\xd8\xd8", "not text in UTF-8"),
        (b"PK\3\4" + bytes(range(256)), "not text in UTF-8"),
        (b'{"cells": ' + b"[" * 200_000, "cannot be taken in"),
        (b'{"a":' * 100_000, "cannot be taken in"),
        (b'{"cells": [], "a": ' + b"1" * 5000 + b"}", "cannot be taken in"),
        (b'{"cells": [' + b"[]," * 1_000_000 + b"0]}", "It holds about 2,000,002 values; at most"),
        (notebook(*[cell()] * 5001), "It has 5,001 code cells; at most 5,000 are graded"),
        (notebook(cell("x" * (2 * 2**20 + 1))), "2,097,153 characters of code; at most 2,097,152"),
        (b" " * (32 * 2**20) + b"{}", "It has 33,554,434 bytes; at most 33,554,432 are read"),
    ],
)
def test_what_is_no_notebook_says_why(data: bytes, says: str) -> None:
    assert says in reason(data)


def test_scripts() -> None:
    script = '# ---\n# x\n# ---\n# %% [markdown]\n# Prose\n# %%\na = 1\n\n# %% tags=["x"]\n!ls\n'
    assert texts(script.encode(), "08_a.py") == ("# ---\n# x\n# ---", "a = 1", "!ls")
    assert texts(script.replace("\n", "\r\n").encode(), "A.PY")[1] == "a = 1"
    assert texts(b"a = 1\nb = 2\n", "a.py") == ("a = 1\nb = 2",)
    assert texts(GOOD, "a.py") == (CODE,), "a notebook by another name"
    assert "no code cell" in reason(b"# %% [markdown]\n# x\n", "a.py")
    assert "JSON breaks" in reason(script.encode(), "a.ipynb")


@pytest.mark.parametrize(
    ("cells", "name", "want"),
    [
        ([cell(CODE)], "x.ipynb", "flash_attention"),
        ([cell("  setup( 'start_here' )")], "08_flash_attention.ipynb", "start_here"),
        ([cell("%time\nsetup('flash_attention'")], "x.ipynb", "flash_attention"),
        ([cell("# setup('flash_attention')")], "x.ipynb", None),
        ([cell("setup(chapter)")], "x.ipynb", None),
        ([cell("setup('nowhere')"), cell("setup('start_here')")], "x.ipynb", "start_here"),
        ([cell("setup('nowhere')")], "08_flash_attention.ipynb", "flash_attention"),
        ([cell("a", id="08_flash_attention-004")], "x.ipynb", "flash_attention"),
        ([cell("a", id=3), cell("#", "markdown", id="00_start_here-001")], "x.ipynb", "start_here"),
        ([cell("a")], "jane/08_flash_attention.ipynb", "flash_attention"),
        ([cell("a")], "Doe_12_08_Flash_Attention-1 (2).ipynb", "flash_attention"),
        ([cell("a")], "08_flash_attention/homework.ipynb", None),
        ([cell("a")], "homework.ipynb", None),
    ],
)
def test_which_chapter(cells, name: str, want: str | None) -> None:
    chapter = parse(name, notebook(*cells)).chapter(CHAPTERS)
    assert (chapter.package if chapter else None) == want


def test_guesses_are_few() -> None:
    many = "\n".join(f'setup("a{number}")' for number in range(1000))
    assert len(parse("a.ipynb", notebook(cell(many))).guesses) == 20


def test_what_it_says_depends_on_the_bytes_alone() -> None:
    for data in (GOOD, b"{", b"\xff", notebook(None, cell("a"))):
        one, other = parse("a.ipynb", data), parse("secret/name.ipynb", data)
        assert vars(one) | {"name": ""} == vars(other) | {"name": ""}


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["cells", "worksheets", "cell_type", "source", "input", "id", "x"]),
            inner | st.sampled_from(["code", "markdown"]),
            max_size=5,
        )
    ),
    max_leaves=30,
)


def is_sound(read: Submission) -> None:
    """What every submission keeps, whatever the bytes were."""
    assert read.status in ("readable", "unreadable")
    assert bool(read.reason) == (read.status == "unreadable")
    assert bool(read.cells) == (read.status == "readable")
    for text in (*read.cells, *read.notes, *read.guesses, read.reason):
        text.encode("utf-8")
        assert "\r" not in text


@given(json_values)
@settings(max_examples=150, deadline=None)
def test_any_json(value) -> None:
    is_sound(parse("a.ipynb", json.dumps(value).encode()))
    is_sound(parse("a.ipynb", json.dumps({"cells": value}).encode()))
    is_sound(
        parse("a.ipynb", json.dumps({"cells": [{"cell_type": "code", "source": value}]}).encode())
    )


@given(st.binary(max_size=200), st.sampled_from(["a.ipynb", "a.py", "", "\0"]))
@settings(max_examples=150, deadline=None)
def test_any_bytes(data: bytes, name: str) -> None:
    is_sound(parse(name, data))


@given(st.integers(0, len(GOOD)), st.binary(max_size=3), st.integers(0, 8))
@settings(max_examples=150, deadline=None)
def test_any_damage(at: int, new: bytes, gone: int) -> None:
    is_sound(parse("a.ipynb", GOOD[:at] + new + GOOD[at + gone :]))


# Where it stands.


def put(path: Path, data: bytes = GOOD) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def found(*paths: Path, students: dict[str, str] | None = None) -> dict[str, tuple[str, str]]:
    """Student, and reason or "", by name."""
    here = find_submissions(paths, students)
    return {each.name: (each.student, each.read().reason) for each in here}


def test_a_folder_of_a_class(tmp_path: Path) -> None:
    root = tmp_path / "class"
    put(root / "jane" / "08_flash_attention.ipynb")
    put(root / "jane" / "deep" / "er" / "x.ipynb")
    put(root / "jane" / ".ipynb_checkpoints" / "08_flash_attention-checkpoint.ipynb")
    put(root / "jane" / "helper.py", b"x = 1")
    put(root / "jane" / "08_flash_attention.py", b"x = 1")
    put(root / "jane" / "notes.txt")
    put(root / "bob.ipynb")
    put(root / "00_start_here.ipynb")
    put(root / "README.md")
    put(root / "amy" / "answers.docx")
    (root / "empty").mkdir()
    assert found(root) == {
        "00_start_here.ipynb": ("class", ""),
        "amy": ("amy", "The folder holds no notebook (.ipynb), but answers.docx."),
        "bob.ipynb": ("bob", ""),
        "jane/08_flash_attention.ipynb": ("jane", ""),
        "jane/08_flash_attention.py": ("jane", ""),
        "jane/deep/er/x.ipynb": ("jane", ""),
    }


def test_files_by_name(tmp_path: Path) -> None:
    one = put(tmp_path / "jane" / "08_flash_attention.ipynb")
    two = put(tmp_path / "bob" / "08_flash_attention.ipynb")
    three = put(tmp_path / "any.py", b"x = 1")
    assert found(one, two, three) == {
        "jane/08_flash_attention.ipynb": ("jane", ""),
        "bob/08_flash_attention.ipynb": ("bob", ""),
        f"{tmp_path.name}/any.py": ("any", ""),
    }
    (tmp_path / "link.ipynb").symlink_to(one)
    assert found(tmp_path / "link.ipynb") == {"jane/08_flash_attention.ipynb": ("jane", "")}


def test_names_that_occur_twice_are_numbered(tmp_path: Path) -> None:
    put(tmp_path / "a" / "jane" / "x.ipynb")
    put(tmp_path / "b" / "jane" / "x.ipynb")
    put(tmp_path / "b" / "jane" / "x.ipynb (2)")
    assert list(found(tmp_path / "a", tmp_path / "b", tmp_path / "a")) == [
        "jane/x.ipynb",
        "jane/x.ipynb (2)",
        "jane/x.ipynb (3)",
    ]


def test_links_devices_and_pipes_are_not_opened(tmp_path: Path) -> None:
    secret = put(tmp_path / "secret" / "solution.ipynb")
    root = tmp_path / "class"
    put(root / "bob" / "a.ipynb")
    (root / "jane").mkdir()
    (root / "jane" / "a.ipynb").symlink_to(secret)
    (root / "jane" / "b.zip").symlink_to(secret)
    (root / "jane" / "folder").symlink_to(secret.parent)
    (root / "jane" / "gone").symlink_to(tmp_path / "nowhere")
    (root / "jane" / "loop.ipynb").symlink_to("loop.ipynb")
    (root / "amy").symlink_to(secret.parent)
    os.mkfifo(root / "jane" / "pipe.ipynb")
    os.mkfifo(root / "jane" / "pipe.zip")
    (root / "jane" / "dir.ipynb").mkdir()
    put(root / "jane" / "dir.ipynb" / "inner.ipynb")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(root / "jane" / "s.ipynb"))
        read = found(root)
    link = "It is a symbolic link. Links are not followed."
    odd = "It is not a regular file: a link, a pipe, a device or a folder."
    assert read == {
        "amy": ("amy", link),
        "bob/a.ipynb": ("bob", ""),
        "jane/a.ipynb": ("jane", link),
        "jane/b.zip": ("jane", link),
        "jane/dir.ipynb/inner.ipynb": ("jane", ""),
        "jane/folder": ("jane", link),
        "jane/loop.ipynb": ("jane", link),
        "jane/pipe.ipynb": ("jane", odd),
        "jane/pipe.zip": ("jane", odd),
        "jane/s.ipynb": ("jane", odd),
    }


def test_a_file_that_becomes_a_pipe_is_not_waited_for(tmp_path: Path, monkeypatch) -> None:
    path = put(tmp_path / "class" / "a.ipynb")
    (source,) = find_submissions([tmp_path / "class"])
    regular = os.lstat(path)
    path.unlink()
    assert source.read().reason == "The file cannot be read: No such file or directory."
    os.mkfifo(path)

    def read_into(reasons: list[str]) -> None:
        reasons.append(source.read().reason)

    # Also where it becomes one between the look at it and its opening.
    for look in (os.lstat, lambda _: regular):
        monkeypatch.setattr(os, "lstat", look)
        said = []
        reader = threading.Thread(target=read_into, args=(said,), daemon=True)
        reader.start()
        reader.join(10)
        assert said == ["It is not a regular file: a link, a pipe, a device or a folder."]


def test_a_huge_file_is_not_read(tmp_path: Path) -> None:
    path = put(tmp_path / "a.ipynb", b"")
    os.truncate(path, 1 << 40)
    assert "1,099,511,627,776 bytes; at most" in found(path)[f"{tmp_path.name}/a.ipynb"][1]


def test_what_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root everything may be read, so the refusal is made here."""
    put(tmp_path / "class" / "jane" / "a.ipynb")
    put(tmp_path / "class" / "bob" / "a.ipynb")
    put(tmp_path / "class" / "amy" / "a.ipynb")
    really_open, really_scan = os.open, os.scandir

    def refuse(path, *args):
        if "jane" in str(path):
            raise PermissionError(13, "Permission denied")
        return really_open(path, *args)

    def refuse_folder(path):
        if str(path).endswith("amy"):
            raise PermissionError(13, "Permission denied")
        return really_scan(path)

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(os, "scandir", refuse_folder)
    assert found(tmp_path / "class") == {
        "amy": ("amy", "It cannot be read: Permission denied."),
        "bob/a.ipynb": ("bob", ""),
        "jane/a.ipynb": ("jane", "The file cannot be read: Permission denied."),
    }


def test_one_student_cannot_flood_the_class(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(sources, "MOST_NOTEBOOKS", 3)
    monkeypatch.setattr(sources, "MOST_FILES", 20)
    put(tmp_path / "class" / "bob" / "a.ipynb")
    for number in range(4):
        put(tmp_path / "class" / "jane" / f"{number}.ipynb")
    for number in range(21):
        put(tmp_path / "class" / "amy" / f"{number}.txt")
    zipped(tmp_path / "class" / "eve.zip", {f"{n}.ipynb": GOOD for n in range(4)})
    zipped(tmp_path / "class" / "eva.zip", {f"{n}.txt": b"" for n in range(21)})
    assert found(tmp_path / "class") == {
        "amy": ("amy", "The folder holds more than 20 files."),
        "bob/a.ipynb": ("bob", ""),
        "eva.zip": ("eva", "The zip holds more than 20 files."),
        "eve.zip": ("eve", "The zip holds 4 notebooks."),
        "jane": ("jane", "The folder holds 4 notebooks."),
    }


def test_names_can_be_printed_and_written(tmp_path: Path) -> None:
    root = tmp_path / "class"
    put(root / "\x1b[31mjane\n" / "a\r.ipynb")
    os.makedirs(os.fsencode(root) + b"/\xff")
    (root / os.fsdecode(b"\xff") / "b.ipynb").write_bytes(GOOD)
    put(root / ("x" * 255) / "c.ipynb")
    for source in find_submissions([root]):
        for text in (source.name, source.student, source.read().name):
            assert text.isprintable()
            assert len(text) <= 200
            text.encode()


# Zips.


def zipped(path: Path, files: dict[str, bytes], **how) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, **how) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def test_a_zip_of_a_class(tmp_path: Path) -> None:
    path = zipped(
        tmp_path / "class.zip",
        {
            "jane/08_flash_attention.ipynb": GOOD,
            "jane/notes.txt": b"",
            "bob/deep/x.ipynb": GOOD,
            "amy.ipynb": GOOD,
            "00_start_here.ipynb": GOOD,
            "__MACOSX/jane/._08_flash_attention.ipynb": b"\0",
            "jane/.ipynb_checkpoints/x.ipynb": GOOD,
            "eve\\x.ipynb": GOOD,
        },
    )
    want = {
        "class.zip/00_start_here.ipynb": ("class", ""),
        "class.zip/amy.ipynb": ("amy", ""),
        "class.zip/bob/deep/x.ipynb": ("bob", ""),
        "class.zip/eve/x.ipynb": ("eve", ""),
        "class.zip/jane/08_flash_attention.ipynb": ("jane", ""),
    }
    assert found(path) == want


def test_one_folder_around_everything_is_nobody(tmp_path: Path) -> None:
    files = {"hand_in/jane/x.ipynb": GOOD, "hand_in/bob.ipynb": GOOD, "__MACOSX/._a": b""}
    owners = {
        name: student for name, (student, _) in found(zipped(tmp_path / "c.zip", files)).items()
    }
    assert owners == {"c.zip/hand_in/bob.ipynb": "bob", "c.zip/hand_in/jane/x.ipynb": "jane"}
    one = zipped(tmp_path / "jane.zip", {"answers/08_flash_attention.ipynb": GOOD})
    assert found(one) == {"jane.zip/answers/08_flash_attention.ipynb": ("jane", "")}


def test_zips_in_a_folder_are_students(tmp_path: Path) -> None:
    root = tmp_path / "class"
    zipped(root / "jane.zip", {"answers/a.ipynb": GOOD, "answers/b.ipynb": b"{"})
    zipped(root / "bob" / "answers.zip", {"a.ipynb": GOOD})
    zipped(root / "amy.zip", {"a.txt": GOOD})
    put(root / "eve.zip", b"no zip at all")
    put(root / "eva.zip", zipped(tmp_path / "x.zip", {"a.ipynb": GOOD}).read_bytes()[:-30])
    put(root / "joe.rar")
    put(root / "kim" / "x.tar.gz")
    read = found(root)
    assert read.pop("jane.zip/answers/b.ipynb")[1].startswith("It is not a notebook")
    broken = "It is not a zip, or its end is missing. Was the upload cut short?"
    assert read == {
        "amy.zip": ("amy", "The zip holds no notebook (.ipynb)."),
        "bob/answers.zip/a.ipynb": ("bob", ""),
        "eva.zip": ("eva", broken),
        "eve.zip": ("eve", broken),
        "jane.zip/answers/a.ipynb": ("jane", ""),
        "joe.rar": ("joe", "This kind of archive is not opened. Hand in a zip."),
        "kim/x.tar.gz": ("kim", "This kind of archive is not opened. Hand in a zip."),
    }


def raw_member(name: str, **attributes) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    for key, value in attributes.items():
        setattr(info, key, value)
    return info


@pytest.mark.parametrize(
    ("info", "data", "says"),
    [
        (raw_member("../../evil.ipynb"), GOOD, "leads out of the zip's own folder"),
        (raw_member("a/../../evil.ipynb"), GOOD, "leads out of the zip's own folder"),
        (raw_member("/etc/evil.ipynb"), GOOD, "leads out of the zip's own folder"),
        (raw_member("C:\\evil.ipynb"), GOOD, "leads out of the zip's own folder"),
        (raw_member("..\\evil.ipynb"), GOOD, "leads out of the zip's own folder"),
        (raw_member("l.ipynb", external_attr=0o120777 << 16), b"/etc/passwd", "a link or a device"),
        (raw_member("l.ipynb", external_attr=0o010644 << 16), b"", "a link or a device"),
        (raw_member("inner.zip"), b"", "an archive inside a zip"),
        (raw_member("inner.tar.gz"), b"", "an archive inside a zip"),
        (raw_member("b.ipynb", compress_type=zipfile.ZIP_LZMA), GOOD, "packed by a method"),
        (raw_member("b.ipynb", compress_type=zipfile.ZIP_BZIP2), GOOD, "packed by a method"),
        (raw_member("b.ipynb", compress_type=zipfile.ZIP_DEFLATED), b" " * 2**21, "200 times"),
        (
            raw_member("b.ipynb", compress_type=zipfile.ZIP_DEFLATED),
            b" " * (32 * 2**20 + 1),
            "33,554,433 bytes",
        ),
    ],
)
@pytest.mark.parametrize("whole_class", [True, False])
def test_members_that_are_refused(tmp_path: Path, info, data, says, whole_class) -> None:
    path = tmp_path / "class" / "jane.zip"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(info, data)
        archive.writestr("jane/fine.ipynb", GOOD)
    read = found(path if whole_class else path.parent)
    assert read.pop("jane.zip/jane/fine.ipynb") == ("jane", "")
    ((name, (_, why)),) = read.items()
    assert says in why
    assert info.filename.replace("\\", "/") in name


def test_a_bomb_that_lies_about_its_size(tmp_path: Path) -> None:
    """The table of contents says 100 bytes; what is packed has 64 MiB."""
    path = zipped(tmp_path / "jane.zip", {"a.ipynb": b" " * 2**26})
    data = bytearray(path.read_bytes())
    central = data.rfind(b"PK\1\2")
    for at in (central + 24, 22):
        data[at : at + 4] = struct.pack("<I", 100)
    path.write_bytes(data)
    ((_, why),) = found(path).values()
    assert why.startswith("It cannot be unpacked")


def test_total_of_a_zip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sources, "LARGEST_UNPACKED", 2 * len(GOOD))
    read = found(zipped(tmp_path / "jane.zip", {f"{n}.ipynb": GOOD for n in range(3)}))
    whys = [why for _, why in read.values()]
    assert whys[:2] == ["", ""]
    assert whys[2].startswith("The notebooks of this zip unpack to more than")


def test_a_huge_table_of_contents_is_not_read(tmp_path: Path, monkeypatch) -> None:
    path = zipped(tmp_path / "jane.zip", {f"{n:03}.txt": b"" for n in range(100)})
    monkeypatch.setattr(sources, "LARGEST_DIRECTORY", 1000)
    monkeypatch.setattr(zipfile, "ZipFile", None)
    assert found(path) == {
        "jane.zip": ("jane", "The zip holds too many files, or too large ones."),
    }


def test_a_table_of_contents_in_the_large_format_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "jane.zip"
    zipped(path, {"a.ipynb": GOOD})
    data = path.read_bytes()
    end = data.rfind(b"PK\5\6")
    path.write_bytes(data[:end] + b"PK\6\7" + b"\0" * 16 + data[end:])
    assert "too many files" in found(path)["jane.zip"][1]


def test_of_two_members_with_one_name_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "jane.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.ipynb", notebook(cell("first")))
        with pytest.warns(UserWarning, match="Duplicate name"):
            archive.writestr("a.ipynb", notebook(cell("second")))
    (source,) = find_submissions([path])
    assert source.read().cells == ("second",)


def test_a_locked_member(tmp_path: Path) -> None:
    path = zipped(tmp_path / "jane.zip", {"a.ipynb": GOOD})
    data = bytearray(path.read_bytes())
    data[data.rfind(b"PK\1\2") + 8] |= 1
    path.write_bytes(data)
    assert found(path)["jane.zip/a.ipynb"][1] == "It is locked with a password."


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_any_damage_of_a_zip(tmp_path_factory: pytest.TempPathFactory, data) -> None:
    folder = tmp_path_factory.mktemp("zip")
    path = zipped(folder / "jane.zip", {"a.ipynb": GOOD, "b/c.ipynb": GOOD})
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    for source in [*find_submissions([path]), *find_submissions([folder])]:
        is_sound(source.read())


def test_many_zips_leave_few_files_open(tmp_path: Path) -> None:
    for number in range(40):
        zipped(tmp_path / "class" / f"s{number:02}.zip", {"a.ipynb": GOOD})
    before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else 0
    assert all(not why for _, why in found(tmp_path / "class").values())
    if before:
        assert len(os.listdir("/proc/self/fd")) <= before + 6


# Paths that cannot be used, and the list of students.


def test_paths_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(PathsError, match=r"nowhere: No such file"):
        find_submissions([tmp_path / "nowhere"])
    with pytest.raises(PathsError, match="holds no notebook"):
        find_submissions([tmp_path])
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    with pytest.raises(PathsError, match="loop"):
        find_submissions([loop])


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("s1", "s1/a.ipynb"),
        ("s1/a.ipynb", "s1/a.ipynb"),
        ("s1/", "s1/a.ipynb"),
        ("a.ipynb", "a.ipynb"),
        ("a", "a.ipynb"),
        ("s1.zip", "s1.zip"),
        ("s1", "s1.zip"),
    ],
)
def test_students_by_folder_file_or_zip(tmp_path: Path, key: str, name: str) -> None:
    if name.endswith(".zip"):
        zipped(tmp_path / "class" / name, {"x.ipynb": GOOD})
    else:
        put(tmp_path / "class" / name)
    put(tmp_path / "class" / "other.ipynb")
    file = put(
        tmp_path / "list.csv", f"\ufeffsubmission,student,mail\n{key}, Jane Doe ,x@y\n".encode()
    )
    sources_found = find_submissions([tmp_path / "class"], read_students(file))
    assert {each.student: each.listed for each in sources_found} == {
        "Jane Doe": True,
        "other": False,
    }


def test_the_more_exact_line_counts(tmp_path: Path) -> None:
    put(tmp_path / "pair" / "a.ipynb")
    put(tmp_path / "pair" / "b.ipynb")
    students = {"pair": "jane", "pair/b.ipynb": "bob"}
    assert [each.student for each in find_submissions([tmp_path], students)] == ["jane", "bob"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"", "the first line names the columns nothing; expected submission and student"),
        (b"file,name\na,b\n", "names the columns file, name; expected submission and student"),
        (b"submission,student\n,jane\n", "line 2: submission or student is empty"),
        (b"submission,student\na,b\nc\n", "line 3: submission or student is empty"),
        (b"submission,student\na,b\na,c\n", "line 3: 'a' is of 'b' and of 'c'"),
        (b"submission,student\na,\xff\n", "is not in UTF-8"),
    ],
)
def test_a_list_of_students_that_cannot_be_used(tmp_path: Path, text: bytes, says: str) -> None:
    with pytest.raises(PathsError) as caught:
        read_students(put(tmp_path / "list.csv", text))
    assert says in str(caught.value)


def test_a_list_of_students_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(PathsError, match="No such file"):
        read_students(tmp_path / "none.csv")


def test_nothing_of_a_submission_is_compiled(tmp_path: Path, monkeypatch) -> None:
    """Reading is text alone."""
    path = put(tmp_path / "a.ipynb", notebook(cell("setup('flash_attention')\nimport this")))

    def fail(*_args, **_named):
        raise AssertionError("code was compiled")

    for name in ("compile", "exec", "eval"):
        monkeypatch.setattr(builtins, name, fail)
    monkeypatch.setattr(ast, "parse", fail)
    (source,) = find_submissions([path])
    read = source.read()
    assert read.status == "readable"
    assert read.chapter(CHAPTERS) == CHAPTERS[1]
