"""Exercises: count the bytes, and find the tile that saves nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable

from course_lib.grading.exercise import Case, Data, Exercise, Misconception


def cases(size: str, seed: int) -> Iterable[Case]:
    """One head: T queries and keys, head dimension D, rows of a tile, bytes an element."""
    yield Case("6 tokens, tiles of 2", {"T": 6, "D": 5, "BLOCK_M": 2, "itemsize": 1})
    yield Case("GPT-2's head", {"T": 1024, "D": 64, "BLOCK_M": 128, "itemsize": 2})
    yield Case("in fp32", {"T": 96, "D": 40, "BLOCK_M": 32, "itemsize": 4})
    yield Case("a ragged last tile", {"T": 1000, "D": 72, "BLOCK_M": 96, "itemsize": 2}, "awkward")
    yield Case(
        "one tile holds everything", {"T": 5, "D": 7, "BLOCK_M": 16, "itemsize": 2}, "awkward"
    )
    yield Case(
        "sizes from the seed",
        {"T": 307 + seed % 89, "D": 24 + seed % 17, "BLOCK_M": 16, "itemsize": 2},
        "awkward",
    )


def harness(answer, data):
    """Call the answer with the sizes."""
    return answer(data["T"], data["D"], data["BLOCK_M"], data["itemsize"])


def oracle(data: Data) -> tuple[int, int]:
    """Counted operation by operation, in elements."""
    rows, dim, tile = data["T"], data["D"], data["BLOCK_M"]
    naive = 2 * rows * dim + rows * rows  # read Q, K, write S
    naive += 2 * rows * rows  # read S, write P
    naive += rows * rows + 2 * rows * dim  # read P, V, write O
    tiled = 0
    for first in range(0, rows, tile):
        here = min(tile, rows - first)
        tiled += 2 * here * dim + 2 * rows * dim  # its Q and O, and every K and V
    return naive * data["itemsize"], tiled * data["itemsize"]


def formula(T: int, D: int, BLOCK_M: int, itemsize: int) -> tuple[int, int]:
    naive = 4 * T * D + 4 * T * T
    tiled = 2 * T * D + math.ceil(T / BLOCK_M) * 2 * T * D
    return naive * itemsize, tiled * itemsize


def tensor_by_tensor(T: int, D: int, BLOCK_M: int, itemsize: int) -> tuple[int, int]:
    operand, scores = T * D * itemsize, T * T * itemsize
    naive = (operand + operand + scores) + (scores + scores) + (scores + operand + operand)
    blocks = -(-T // BLOCK_M)
    return naive, operand + operand + blocks * (operand + operand)


def _wrong(naive_scores: float = 4, naive_operands: int = 4, tiled=None, itemsize=None):
    def answer(T: int, D: int, BLOCK_M: int, size: int) -> tuple[int, int]:
        each = size if itemsize is None else itemsize
        naive = naive_operands * T * D + int(naive_scores * T * T)
        blocks = -(-T // BLOCK_M)
        elements = 2 * T * D + blocks * 2 * T * D if tiled is None else tiled(T, D, BLOCK_M, blocks)
        return naive * each, elements * each

    return answer


EXERCISE = Exercise(
    id="flash_attention.bytes_moved",
    kind="function",
    title="Count the bytes",
    task=(
        "For one head with `T` queries and `T` keys, return the bytes that plain attention moves "
        "and the bytes that tiled attention moves, as two integers. Plain attention is three "
        "operations that each read their inputs from memory and write their output: `S = QKᵀ`, "
        "`P = softmax(S)`, which reads S once, and `O = PV`. Tiled attention reads each tile of "
        "`BLOCK_M` queries once, writes its outputs once, and reads all of K and V for every tile."
    ),
    why="You can say before you write a kernel what it can save at best.",
    points=3,
    minutes=8,
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
            _wrong(naive_operands=0),
            "How large is the part of Q, K, V and O when T is 6?",
            "This is what you get when only the score matrices are counted.",
        ),
        Misconception(
            "K and V read once",
            _wrong(tiled=lambda T, D, M, blocks: 4 * T * D),
            "The second tile of queries needs the first key again. Where is it by then?",
            "This is what you get when K and V are counted once instead of once a query tile.",
        ),
        Misconception(
            "V forgotten",
            _wrong(tiled=lambda T, D, M, blocks: 2 * T * D + blocks * T * D),
            "Each query tile reads every key. What else does it read of every key's row?",
            "This is what you get when only K is counted for each query tile.",
        ),
        Misconception(
            "last tile dropped",
            _wrong(tiled=lambda T, D, M, blocks: 2 * T * D + T // M * 2 * T * D),
            "How many tiles of 96 rows cover 1,000 rows?",
            "This is what you get when the number of tiles is rounded down.",
        ),
        Misconception(
            "whole tiles counted",
            _wrong(tiled=lambda T, D, M, blocks: 2 * blocks * M * D + blocks * 2 * T * D),
            "The last tile holds fewer rows than the others. Does it read rows that do not exist?",
            "This is what you get when the last tile's masked rows are counted as read and "
            "written.",
        ),
        Misconception(
            "scores written by the tiled kernel",
            _wrong(tiled=lambda T, D, M, blocks: 2 * T * D + blocks * 2 * T * D + T * T),
            "Where does a tile of scores live, and for how long?",
            "This is what you get when the tiles of scores are counted too: they never leave the "
            "chip.",
        ),
        Misconception(
            "elements instead of bytes",
            _wrong(itemsize=1),
            "How many bytes has one element here?",
            "This is what you get when elements are counted and `itemsize` is not used.",
        ),
        Misconception(
            "both in the other order",
            lambda T, D, BLOCK_M, itemsize: formula(T, D, BLOCK_M, itemsize)[::-1],
            "Which of the two numbers should come first?",
            "This is what you get when the tiled count is returned before the plain one.",
        ),
    ),
    hints=(
        "By hand: T = 6, D = 5, tiles of 2 rows, 1 byte each. S has 36 bytes. Plain: read Q and K "
        "(60), write S (36), read S and write P (72), read P and V (66), write O (30).",
        "Print both numbers divided by `T * D * itemsize`. For the tiled one this must be a whole "
        "number: 2, and 2 more for each tile.",
        "```python\nnaive = ... * T * D + ... * T * T\ntiles = ...\n"
        "tiled = 2 * T * D + tiles * ...\n"
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
        "T is large and D = 128, in 16 bits. At which `BLOCK_M` does tiled attention move about as "
        "many bytes as plain attention? Search with your `bytes_moved`, then explain the number."
    ),
    why="Tiling is not the idea; reuse is. You know now how much reuse is none.",
    points=1,
    minutes=2,
    difficulty=2,
    core=True,
    cases=lambda size, seed: [Case("T = 8,192, D = 128, 2 bytes", {})],
    oracle=lambda data: 64.0,
    # 4 T² = 2 T² D / BLOCK_M. With T = 8,192 in full, 63 to 65 are as good.
    accepts=(64.0, 64),
    misconceptions=(
        Misconception(
            "D instead of D / 2",
            128.0,
            "Plain attention moves the T × T matrix four times. How many rows does each query tile "
            "read for every key?",
            "This is what you get when BLOCK_M is set equal to D. At 128 rows tiling halves the "
            "bytes.",
        ),
        Misconception(
            "one row",
            1.0,
            "How often is K read when a tile has one row?",
            "This is what you get when a tile of one row is taken for plain attention. It reads K "
            "and V anew for every query: 64 times more than plain attention.",
        ),
        Misconception(
            "scores counted twice",
            256.0,
            "How often does each element of the T × T matrices cross the bus?",
            "This is what you get when S is written once and read once, and P is free.",
        ),
        Misconception(
            "K read, V forgotten",
            32.0,
            "A tile reads each key. What else does it read for that key?",
            "This is what you get when only K is read for every tile: twice too small.",
        ),
    ),
    hints=(
        "For large T only two terms matter: 4·T² for plain attention, and (T / BLOCK_M)·2·T·D for "
        "the tiled one. When are they equal?",
        "Print `bytes_moved(8192, 128, b, 2)` for b = 16, 32, 64, 128, 256.",
        "```python\nfor b in (16, 32, 64, 128, 256):\n"
        "    naive, tiled = bytes_moved(8192, 128, b, 2)\n"
        "    print(b, naive / tiled)\nuseless_tile = ...\n```",
    ),
    unlocks=("tiled_attention",),
    usual_failures=("takes D for the answer", "thinks that any tile must save something"),
)
