"""Questions of chapter 00: what is asked before its results, and in later chapters."""

from __future__ import annotations

import random

from course_lib.notebook.questions import Numbers, Question

PREDICT = (
    Question(
        id="start_here.slowest",
        prompt=(
            "`x` holds 20 million float32 numbers, and the result is written into a tensor that "
            "is already there. On one CPU thread, how long does `torch.add(x, 1, out=out)` take, "
            "compared with the plain copy `out.copy_(x)`?"
        ),
        choices={
            "a": "about twice as long: a copy and an addition",
            "b": "about half as long again",
            "c": "as long as the copy, within a quarter",
        },
        answer="c",
        replies={
            "a": "That would be so if the addition came after the copy. It happens while the core "
            "waits for the next numbers, and it has waited for them anyway.",
            "b": "One addition a number is nothing beside fetching the number. The core waits for "
            "memory during most of the time, with or without the addition.",
        },
        reply=(
            "Both read 80 MB and write 80 MB, and that is what takes the time. `exp` shows where "
            "this ends: with about a dozen operations a number, one core computes longer than it "
            "waits."
        ),
    ),
    Question(
        id="start_here.matmul",
        prompt=(
            "Adding 1 to 20 million numbers is 20 million operations. A matrix product of two "
            "1024 × 1024 matrices is 2,147 million: 107 times as many. On one CPU thread, how "
            "much longer does the product take?"
        ),
        choices={
            "a": "about 100 times as long",
            "b": "about 30 times as long",
            "c": "less than 10 times as long",
        },
        answer="c",
        replies={
            "a": "That would be so if time went with operations. It went with bytes: the product "
            "moves 12 MB, the addition 160 MB.",
            "b": "You allowed for something that hides the arithmetic, and it hides more than "
            "that. Each number of the product is fetched rarely and used a thousand times.",
        },
        reply=(
            "The product uses each number in 1,024 multiplications; the addition uses it in one. "
            "Operations per byte decide which of the two limits you hit."
        ),
    ),
    Question(
        id="start_here.overwritten",
        prompt=(
            "The kernel above runs with n = 100, BLOCK = 64 and two programs, and has no mask. "
            "`out` is followed in memory by another tensor. How many elements of that neighbour "
            "does the launch overwrite?"
        ),
        answer=28,
        tolerance=0.0,
        unit="elements",
        replies={
            "low": "Nothing stops the second program at element 100: a pointer has no length.",
            "high": "Two programs of 64 lanes write elements 0 to 127. Elements 0 to 99 are `out`.",
        },
        reply=(
            "Two programs write 2 × 64 = 128 elements, and `out` has 100. The answer in `out` is "
            "right all the same, which is what makes this bug quiet."
        ),
    ),
)


def _bytes_numbers(rng: random.Random) -> Numbers:
    return {"n": rng.choice([5, 15, 25, 30, 45, 60, 75])}


def _time_numbers(rng: random.Random) -> Numbers:
    return {"n": rng.choice([50, 100, 150, 250]), "speed": rng.choice([10, 20, 25, 50, 100])}


def _grid_numbers(rng: random.Random) -> Numbers:
    block = rng.choice([64, 128, 256])
    return {"n": block * rng.randint(3, 9) + rng.randint(1, block - 1), "block": block}


def _matmul_numbers(rng: random.Random) -> Numbers:
    return {"n": rng.choice([600, 1200, 1800, 2400, 3000])}


def _ratio_numbers(rng: random.Random) -> Numbers:
    return {"ops": rng.choice([2, 3, 4]), "n": rng.choice([20, 40, 80])}


RECALL = (
    Question(
        id="start_here.bytes_of_add",
        prompt=(
            "`x` holds {n} million float32 numbers. `y = x + 1` is written to new memory. How "
            "many MB must cross between memory and the core at least?"
        ),
        numbers=_bytes_numbers,
        answer=lambda n: 8 * n,
        unit="MB",
        replies={
            "low": "Count both directions: every number is read, and every result is written.",
            "high": "A float32 number has 4 bytes, and each is moved once in and once out.",
        },
        reply="4 bytes are read and 4 are written for each number: 8 × {n} million bytes.",
    ),
    Question(
        id="start_here.time_of_copy",
        prompt=(
            "Memory delivers {speed} GB/s, reads and writes together. How many milliseconds does "
            "a copy of {n} million float32 numbers take at least?"
        ),
        numbers=_time_numbers,
        answer=lambda n, speed: 8 * n / speed,
        unit="ms",
        replies={
            "low": "A copy reads each number and writes it again: 8 bytes each, not 4.",
            "high": "A float32 number has 4 bytes. Divide MB by GB/s and you have milliseconds.",
        },
        reply="8 × {n} MB at {speed} GB/s: {answer} ms, whatever the processor computes meanwhile.",
    ),
    Question(
        id="start_here.programs",
        prompt=(
            "A kernel adds two vectors of {n:,} numbers, {block} of them a program. How many "
            "programs must be launched?"
        ),
        numbers=_grid_numbers,
        answer=lambda n, block: -(-n // block),
        tolerance=0.0,
        unit="programs",
        replies={
            "low": "The last program is only partly filled, but it is needed all the same.",
            "high": "Divide and round up once: `triton.cdiv(n, block)`.",
        },
        reply="{n:,} divided by {block}, rounded up, is {answer}.",
    ),
    Question(
        id="start_here.written_past_the_end",
        prompt=(
            "The same kernel has n = {n:,} and BLOCK = {block}, and its author forgot the mask. "
            "How many elements past the end of the output does it overwrite?"
        ),
        numbers=_grid_numbers,
        answer=lambda n, block: -n % block,
        tolerance=0.0,
        unit="elements",
        replies={
            "low": "The last program writes its whole block, whatever is left of the vector.",
            "high": "Only the last program reaches past the end, and only with part of its block.",
        },
        reply=(
            "The programs cover a multiple of {block}; what exceeds {n:,} is {answer}. The result "
            "is right all the same, which is what makes this bug quiet."
        ),
    ),
    Question(
        id="start_here.flops_per_byte",
        prompt=(
            "Two {n:,} × {n:,} float32 matrices are multiplied. If each of the three matrices "
            "crosses between memory and the core once, how many operations is that for each byte?"
        ),
        numbers=_matmul_numbers,
        answer=lambda n: n / 6,
        unit="operations a byte",
        replies={
            "low": "The operations are 2n³: one multiplication and one addition for each of n³.",
            "high": "Three matrices of 4n² bytes each are moved, the result among them.",
        },
        reply="2n³ operations over 3 × 4n² bytes is n/6.",
    ),
    Question(
        id="start_here.fused",
        prompt=(
            "`y = x + 1` is followed by {ops} more element-wise steps on {n} million numbers, each "
            "a call of its own that reads the result before it. One kernel does all of them in one "
            "pass. About how many times as fast is it, where memory is the limit?"
        ),
        numbers=_ratio_numbers,
        answer=lambda ops, n: ops + 1,
        unit="times",
        tolerance=0.15,
        replies={
            "low": "Each call reads everything and writes everything again. One pass does so once.",
            "high": "Count the calls: each one costs one read and one write of the whole tensor.",
        },
        reply="{answer} passes over memory become one; the arithmetic stays the same.",
    ),
)
