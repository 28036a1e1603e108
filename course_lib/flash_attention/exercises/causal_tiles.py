"""Exercise: which tiles a causal kernel visits, and which of them need a mask."""

from __future__ import annotations

from collections.abc import Iterable

from course_lib.grading.exercise import Case, Data, Exercise, Misconception

Plan = list[tuple[int, int]]


def cases(size: str, seed: int) -> Iterable[Case]:
    """Queries, keys, and the tile's extents."""

    def sizes(Tq: int, Tk: int, BLOCK_M: int, BLOCK_N: int) -> Data:
        return {"Tq": Tq, "Tk": Tk, "BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N}

    yield Case("4 × 4 in single cells", sizes(4, 4, 1, 1))
    yield Case("6 × 6 in tiles of 2 × 2", sizes(6, 6, 2, 2))
    yield Case("1,024 × 1,024 in tiles of 32", sizes(1024, 1024, 32, 32))
    yield Case("tall tiles: 12 × 12 in 4 × 2", sizes(12, 12, 4, 2))
    yield Case("wide tiles: 12 × 12 in 2 × 3", sizes(12, 12, 2, 3))
    yield Case("ragged: 10 × 10 in 4 × 3", sizes(10, 10, 4, 3), "awkward")
    yield Case("3 new queries, 11 keys", sizes(3, 11, 2, 4), "awkward")
    yield Case("7 queries, 4 keys: three see nothing", sizes(7, 4, 2, 2), "awkward")
    yield Case("sizes from the seed", sizes(20 + seed % 13, 31 + seed % 7, 5, 3), "awkward")


def harness(answer, data):
    """Call the answer; a plan may be any list of pairs of integers."""
    plan = answer(data["Tq"], data["Tk"], data["BLOCK_M"], data["BLOCK_N"])
    return [(int(full), int(end)) for full, end in plan]


def oracle(data: Data) -> Plan:
    """Looks at every element of every tile."""
    Tq, Tk, M, N = data.values()
    plan = []
    for first_row in range(0, Tq, M):
        rows = range(first_row, min(first_row + M, Tq))
        full = visited = 0
        for first_key in range(0, Tk, N):
            keys = range(first_key, first_key + N)  # a ragged tile has columns past the end
            seen = [j < Tk and j <= i + Tk - Tq for i in rows for j in keys]
            full += all(seen)
            visited += any(seen)
        plan.append((full, visited))
    return plan


def closed_form(Tq: int, Tk: int, BLOCK_M: int, BLOCK_N: int) -> Plan:
    plan = []
    for start in range(0, Tq, BLOCK_M):
        last = min(start + BLOCK_M, Tq) - 1
        seen_by_all = min(max(start + Tk - Tq + 1, 0), Tk)
        seen_by_any = min(max(last + Tk - Tq + 1, 0), Tk)
        plan.append((seen_by_all // BLOCK_N, -(-seen_by_any // BLOCK_N)))
    return plan


def tile_by_tile(Tq: int, Tk: int, BLOCK_M: int, BLOCK_N: int) -> Plan:
    plan = []
    for top in range(0, Tq, BLOCK_M):
        bottom = min(top + BLOCK_M, Tq) - 1
        tiles = [(left, left + BLOCK_N - 1) for left in range(0, Tk, BLOCK_N)]
        full = sum(right < Tk and right <= top + Tk - Tq for _, right in tiles)
        end = sum(left <= bottom + Tk - Tq for left, _ in tiles)
        plan.append((full, end))
    return plan


def _wrong(shift=lambda Tq, Tk: Tk - Tq, full=None, end=None):
    """The closed form with its parts replaced: full(first, Tk, N) and end(last, Tk, N)."""

    def count(last: int, Tk: int, N: int) -> int:
        return -(-min(max(last + 1, 0), Tk) // N)

    def whole(first: int, Tk: int, N: int) -> int:
        return min(max(first + 1, 0), Tk) // N

    def answer(Tq: int, Tk: int, BLOCK_M: int, BLOCK_N: int) -> Plan:
        plan = []
        for start in range(0, Tq, BLOCK_M):
            first = start + shift(Tq, Tk)
            last = min(start + BLOCK_M, Tq) - 1 + shift(Tq, Tk)
            plan.append(
                (
                    (full or whole)(first, Tk, BLOCK_N),
                    (end or count)(last, Tk, BLOCK_N),
                )
            )
        return plan

    return answer


def _square(Tq: int, Tk: int, BLOCK_M: int, BLOCK_N: int) -> Plan:
    """Thinks that tile row i ends at tile column i."""
    tiles = -(-Tk // BLOCK_N)
    return [(min(i, tiles), min(i + 1, tiles)) for i in range(-(-Tq // BLOCK_M))]


def _first_query_decides(Tq: int, Tk: int, BLOCK_M: int, BLOCK_N: int) -> Plan:
    plan = []
    for start in range(0, Tq, BLOCK_M):
        seen = min(max(start + Tk - Tq + 1, 0), Tk)
        plan.append((seen // BLOCK_N, -(-seen // BLOCK_N)))
    return plan


EXERCISE = Exercise(
    id="flash_attention.causal_tiles",
    kind="function",
    title="Causal: skip what nobody sees",
    task=(
        "Query `i` sees key `j` where `j <= i + Tk - Tq`: the last query sees every key. For each "
        "block of `BLOCK_M` queries return `(full, end)`: the first `full` tiles of `BLOCK_N` keys "
        "need no mask, tiles `full` to `end - 1` need one, and those from `end` on are not "
        "visited. A tile that reaches past the last key needs a mask. Masked query rows past `Tq` "
        "do not count."
    ),
    why="Skipping is half of causal attention's speed; masking only the diagonal is the rest.",
    points=4,
    minutes=15,
    difficulty=3,
    core=False,
    cases=cases,
    harness=harness,
    oracle=oracle,
    accepts=(closed_form, tile_by_tile),
    misconceptions=(
        Misconception(
            "nothing skipped",
            _wrong(end=lambda last, Tk, N: -(-Tk // N)),
            "Which queries of the first block see the last key?",
            "This is what you get when every tile is visited and the mask does the work: right, "
            "and twice the time.",
        ),
        Misconception(
            "every visited tile masked",
            _wrong(full=lambda first, Tk, N: 0),
            "Does any query of the last block fail to see the first key?",
            "This is what you get when `full` is always 0: every tile pays for a mask.",
        ),
        Misconception(
            "diagonal tile not masked",
            _wrong(full=lambda first, Tk, N: -(-min(max(first + 1, 0), Tk) // N)),
            "Does the first query of the block see the last key of that tile?",
            "This is what you get when `full` is rounded up: the tile on the diagonal is used "
            "without a mask, so queries see the future.",
        ),
        Misconception(
            "stops at the first query",
            _first_query_decides,
            "The last query of the block sees more keys than the first. Which one decides where to "
            "stop?",
            "This is what you get when `end` is taken from the block's first query.",
        ),
        Misconception(
            "off by one: own key left out",
            _wrong(
                full=lambda first, Tk, N: min(max(first, 0), Tk) // N,
                end=lambda last, Tk, N: -(-min(max(last, 0), Tk) // N),
            ),
            "Does query i see key i?",
            "This is what you get with `j < i` in place of `j <= i`.",
        ),
        Misconception(
            "aligned at the top left",
            _wrong(shift=lambda Tq, Tk: 0),
            "Three new queries follow eight cached keys. How many keys does the first of them see?",
            "This is what you get when query i sees keys up to i also where Tq and Tk differ.",
        ),
        Misconception(
            "square tiles assumed",
            _square,
            "Where does the diagonal cross tile row i when tiles are 4 × 2?",
            "This is what you get when tile row i is taken to end at tile column i.",
        ),
        Misconception(
            "last tile dropped",
            _wrong(end=lambda last, Tk, N: min(max(last + 1, 0), Tk) // N),
            "Five keys are seen, in tiles of 3. How many tiles hold them?",
            "This is what you get when `end` is rounded down: the diagonal's last keys are lost.",
        ),
    ),
    hints=(
        "Draw 4 × 4 in tiles of 2 × 2. Block 0 sees keys 0 and 1: one tile, with a mask. Block 1 "
        "sees four keys: one tile without, one with.",
        "Print the sums over all blocks for 1,024 × 1,024 in tiles of 32: 528 of 1,024 tiles are "
        "visited, and 32 of them are masked.",
        "```python\nfor start in range(0, Tq, BLOCK_M):\n    last = ...\n"
        "    seen_by_all = min(max(start + Tk - Tq + ..., 0), Tk)\n    seen_by_any = ...\n"
        "    plan.append((seen_by_all // BLOCK_N, ...))\n```",
    ),
    usual_failures=(
        "takes the first query of a block for both bounds",
        "aligns at the top left, which only shows where Tq and Tk differ",
    ),
)
