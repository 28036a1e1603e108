"""Exercises: count the bytes, and find the tile that saves nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable

from course_lib.grading.exercise import Case, Data, Exercise, Misconception


def cases(size: str, seed: int) -> Iterable[Case]:
    """One head: Tq queries, Tk keys, head dimension D, rows of a tile, bytes an element."""

    def sizes(Tq: int, Tk: int, D: int, BLOCK_M: int, itemsize: int) -> Data:
        return {"Tq": Tq, "Tk": Tk, "D": D, "BLOCK_M": BLOCK_M, "itemsize": itemsize}

    yield Case("6 queries, 4 keys, tiles of 2", sizes(6, 4, 5, 2, 1))
    yield Case("1,024 queries and keys", sizes(1024, 1024, 64, 128, 2))
    yield Case("few queries, many keys, in fp32", sizes(64, 960, 40, 32, 4))
    yield Case("a ragged last tile", sizes(1000, 200, 72, 96, 2), "awkward")
    yield Case("one tile holds every query", sizes(5, 9, 7, 16, 2), "awkward")
    yield Case("sizes from the seed", sizes(307 + seed % 89, 211, 24 + seed % 17, 16, 2), "awkward")


def harness(answer, data):
    """Call the answer with the sizes."""
    return answer(data["Tq"], data["Tk"], data["D"], data["BLOCK_M"], data["itemsize"])


def oracle(data: Data) -> tuple[int, int]:
    """Counted operation by operation, in elements."""
    rows, keys, dim, tile = data["Tq"], data["Tk"], data["D"], data["BLOCK_M"]
    naive = rows * dim + keys * dim + rows * keys  # read Q, K, write S
    naive += 2 * rows * keys  # read S, write P
    naive += rows * keys + keys * dim + rows * dim  # read P, V, write O
    tiled = 0
    for first in range(0, rows, tile):
        here = min(tile, rows - first)
        tiled += 2 * here * dim + 2 * keys * dim  # its Q and O, and every K and V
    return naive * data["itemsize"], tiled * data["itemsize"]


def formula(Tq: int, Tk: int, D: int, BLOCK_M: int, itemsize: int) -> tuple[int, int]:
    naive = 2 * (Tq + Tk) * D + 4 * Tq * Tk
    tiled = 2 * Tq * D + math.ceil(Tq / BLOCK_M) * 2 * Tk * D
    return naive * itemsize, tiled * itemsize


def tensor_by_tensor(Tq: int, Tk: int, D: int, BLOCK_M: int, itemsize: int) -> tuple[int, int]:
    q = out = Tq * D * itemsize
    k = v = Tk * D * itemsize
    scores = probs = Tq * Tk * itemsize
    naive = (q + k + scores) + (scores + probs) + (probs + v + out)
    blocks = -(-Tq // BLOCK_M)
    return naive, q + out + blocks * (k + v)


def _wrong(naive_scores: float = 4, operands: bool = True, tiled=None, itemsize=None):
    def answer(Tq: int, Tk: int, D: int, BLOCK_M: int, size: int) -> tuple[int, int]:
        each = size if itemsize is None else itemsize
        naive = 2 * (Tq + Tk) * D * operands + int(naive_scores * Tq * Tk)
        blocks = -(-Tq // BLOCK_M)
        if tiled is None:
            elements = 2 * Tq * D + blocks * 2 * Tk * D
        else:
            elements = tiled(Tq, Tk, D, BLOCK_M, blocks)
        return naive * each, elements * each

    return answer


def one_length(T: int, D: int, BLOCK_M: int, itemsize: int) -> tuple[int, int]:
    """As many keys as queries."""
    return formula(T, T, D, BLOCK_M, itemsize)


EXERCISE = Exercise(
    id="flash_attention.bytes_moved",
    kind="function",
    title="Count the bytes",
    task=(
        "For one head with `Tq` queries and `Tk` keys, return the bytes that plain attention moves "
        "and the bytes that tiled attention moves, as two integers. Plain attention is three "
        "operations that each read their inputs from memory and write their output: `S = QKᵀ`, "
        "`P = softmax(S)`, which reads S once, and `O = PV`. Tiled attention reads each tile of "
        "`BLOCK_M` queries once, writes its outputs once, and reads all of K and V for every tile."
    ),
    why="You can say before you write a kernel what it can save at best.",
    points=3,
    minutes=5,
    difficulty=2,
    core=True,
    cases=cases,
    harness=harness,
    oracle=oracle,
    outputs=("naive", "tiled"),
    accepts=(formula, tensor_by_tensor),
    misconceptions=(
        Misconception(
            "scores moved twice",
            _wrong(naive_scores=2),
            "S is written, and then read. What happens to P?",
            "This is what you get when the softmax's own read and write are left out: S is written "
            "and read, and so is P.",
        ),
        Misconception(
            "scores moved three times",
            _wrong(naive_scores=3),
            "Write S, read S, write P: which operation reads P?",
            "This is what you get when the read of P by the second product is forgotten.",
        ),
        Misconception(
            "Q, K, V and O left out",
            _wrong(operands=False),
            "How large is the part of Q, K, V and O beside S when both lengths are 6?",
            "This is what you get when only the score matrices are counted.",
        ),
        Misconception(
            "K and V read once",
            _wrong(tiled=lambda Tq, Tk, D, M, blocks: 2 * (Tq + Tk) * D),
            "The second tile of queries needs the first key again. Where is it by then?",
            "This is what you get when K and V are counted once instead of once a query tile.",
        ),
        Misconception(
            "V forgotten",
            _wrong(tiled=lambda Tq, Tk, D, M, blocks: 2 * Tq * D + blocks * Tk * D),
            "Each query tile reads every key. What else does it read of every key's row?",
            "This is what you get when only K is counted for each query tile.",
        ),
        Misconception(
            "last tile dropped",
            _wrong(tiled=lambda Tq, Tk, D, M, blocks: 2 * Tq * D + Tq // M * 2 * Tk * D),
            "How many tiles of 96 rows cover 1,000 rows?",
            "This is what you get when the number of tiles is rounded down.",
        ),
        Misconception(
            "whole tiles counted",
            _wrong(tiled=lambda Tq, Tk, D, M, blocks: 2 * blocks * M * D + blocks * 2 * Tk * D),
            "The last tile holds fewer rows than the others. Does it read rows that do not exist?",
            "This is what you get when the last tile's masked rows are counted as read and "
            "written.",
        ),
        Misconception(
            "scores written by the tiled kernel",
            _wrong(tiled=lambda Tq, Tk, D, M, blocks: 2 * Tq * D + blocks * 2 * Tk * D + Tq * Tk),
            "Where does a tile of scores live, and for how long?",
            "This is what you get when the tiles of scores are counted too: they never leave the "
            "chip.",
        ),
        Misconception(
            "tiles counted over the keys",
            _wrong(tiled=lambda Tq, Tk, D, M, blocks: 2 * Tq * D + -(-Tk // M) * 2 * Tk * D),
            "A tile holds `BLOCK_M` queries. How many tiles do `Tq` queries make?",
            "This is what you get when the number of tiles is taken from the keys.",
        ),
        Misconception(
            "as many keys as queries",
            lambda Tq, Tk, D, BLOCK_M, itemsize: one_length(Tq, D, BLOCK_M, itemsize),
            "Which of Q, K, V, O have `Tq` rows, and which have `Tk`?",
            "This is what you get when the keys are counted with the number of queries, as in the "
            "chapter's formula, where both are N.",
        ),
        Misconception(
            "queries read anew for each key tile",
            _wrong(tiled=lambda Tq, Tk, D, M, blocks: 2 * Tk * D + blocks * 2 * Tq * D),
            "Which tensors does a tile of queries keep, and which does it read from end to end?",
            "This is what you get when Q and O are moved once a tile, and K and V once: the loops "
            "exchanged.",
        ),
        Misconception(
            "elements instead of bytes",
            _wrong(itemsize=1),
            "How many bytes has one element here?",
            "This is what you get when elements are counted and `itemsize` is not used.",
        ),
        Misconception(
            "both in the other order",
            lambda Tq, Tk, D, BLOCK_M, itemsize: formula(Tq, Tk, D, BLOCK_M, itemsize)[::-1],
            "Which of the two numbers should come first?",
            "This is what you get when the tiled count is returned before the plain one.",
        ),
    ),
    hints=(
        "By hand: 6 queries, 4 keys, D = 5, tiles of 2 rows, 1 byte each. Plain: read Q (30) and K "
        "(20), write S (24), read S and write P (48), read P (24) and V (20), write O (30).",
        "Print both for `Tk = 2 * Tq` and for `Tk = Tq`: without Q and O, which stay as they are, "
        "each must be twice as large.",
        "```python\nnaive = ... * Tq * D + ... * Tk * D + ... * Tq * Tk\ntiles = ...\n"
        "tiled = 2 * Tq * D + tiles * ...\n"
        "return naive * itemsize, tiled * itemsize\n```",
    ),
    unlocks=("useless_tile",),
    usual_failures=(
        "counts S and P once each instead of once written and once read",
        "rounds the number of tiles down",
    ),
)


USELESS_TILE = Exercise(
    id="flash_attention.useless_tile",
    kind="answer",
    title="The tile that saves nothing",
    task=(
        "T queries, T keys, T large, and D = 96. At which `BLOCK_M` does tiled attention move "
        "about as many bytes as plain attention? Search with your `bytes_moved`, then explain the "
        "number."
    ),
    why="Tiling is not the idea; reuse is. You know now how much reuse is none.",
    points=1,
    minutes=2,
    difficulty=2,
    core=True,
    cases=lambda size, seed: [Case("T = 8,192, D = 96", {})],
    oracle=lambda data: 48.0,
    # 4 T² = 2 T² D / BLOCK_M. With T = 8,192 the balance lies at 47.7, so 47 to 49 are as good.
    accepts=(48.0, 47.75),
    misconceptions=(
        Misconception(
            "D instead of D / 2",
            96.0,
            "Plain attention moves the T × T matrix four times. How many rows does each query tile "
            "read for every key?",
            "This is what you get when BLOCK_M is set equal to D, or S and P are each moved "
            "once. At 96 rows tiling halves the bytes.",
        ),
        Misconception(
            "one row",
            1.0,
            "How often is K read when a tile has one row?",
            "This is what you get when a tile of one row is taken for plain attention. It reads K "
            "and V anew for every query: 48 times more than plain attention.",
        ),
        Misconception(
            "scores counted once",
            192.0,
            "How often does each element of the T × T matrices cross the bus?",
            "This is what you get when the T × T numbers are moved once. S is written and read, "
            "and so is P.",
        ),
        Misconception(
            "K read, V forgotten",
            24.0,
            "A tile reads each key. What else does it read for that key?",
            "This is what you get when only K is read for every tile: twice too small.",
        ),
        Misconception(
            "another head dimension",
            64.0,
            "For which D is 64 right, and which D does the task name?",
            "This is what you get for D = 128, or when one of the four crossings of the T × T "
            "matrices is forgotten.",
        ),
    ),
    hints=(
        "For large T only two terms matter: 4·T² for plain attention, and (T / BLOCK_M)·2·T·D for "
        "the tiled one. When are they equal?",
        "Print `bytes_moved(8192, 8192, 96, b, 4)` for b = 16, 24, 32, 48, 64, 96, 192.",
        "```python\nfor b in (16, 24, 32, 48, 64, 96, 192):\n"
        "    naive, tiled = bytes_moved(8192, 8192, 96, b, 4)\n"
        "    print(b, naive / tiled)\nuseless_tile = ...\n```",
    ),
    unlocks=("tiled_attention",),
    usual_failures=("takes D for the answer", "thinks that any tile must save something"),
)
