"""Exercise: published is not implemented. What `is_causal=True` does with one new token."""

from __future__ import annotations

from course_lib.grading.exercise import Case, Data, Exercise, Misconception


def measured(data: Data) -> str:
    """Runs the call, and reads off which claim it follows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 1, 8, generator=generator)
    k, v = torch.randn(2, 1, 1, 10, 8, generator=generator)
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(q, k, v, is_causal=True)[0, 0, 0]
    rows = {"A": attention(q, k, v)[0, 0, 0], "B": v[0, 0, 0], "C": v[0, 0, -1]}
    return min(rows, key=lambda letter: float((out - rows[letter]).abs().max()))


EXERCISE = Exercise(
    id="flash_attention.one_new_token",
    kind="choice",
    title="Published ≠ implemented: one new token",
    task=(
        "A model decodes: one new query, ten cached keys. Someone calls "
        "`torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)`. What is the "
        "output? Predict, then measure the distance to each candidate, then give the letter."
    ),
    why="You check a library's alignment before you trust it with a cache.",
    points=1,
    minutes=5,
    difficulty=2,
    core=False,
    cases=lambda size, seed: [Case("one query, ten keys, is_causal=True", {})],
    oracle=measured,
    accepts=("B", "B"),
    choices={
        "A": "The softmax over all ten keys: the new token may see everything before it.",
        "B": "Exactly `v[0]`: the query is taken to be token 0, and sees key 0 alone.",
        "C": "Exactly `v[9]`: the query sees its own key alone.",
        "D": "An error, since the score matrix is not square.",
    },
    misconceptions=(
        Misconception(
            "bottom right",
            "A",
            "With one query and ten keys, which element of the mask is its diagonal's first?",
            "This is what you get where causal masks are aligned at the bottom right, as in the "
            "flash-attn package since 2.1. PyTorch aligns at the top left.",
        ),
        Misconception(
            "own key only",
            "C",
            "A causal mask hides what comes later. Which keys come later than the first?",
            "This is what you get when causal is read as: only the newest key.",
        ),
        Misconception(
            "an error",
            "D",
            "Did you run it?",
            "This is what you would hope for. The call runs, and returns something.",
        ),
    ),
    hints=(
        "Draw the mask `torch.ones(1, 10).tril()`: one row. Which elements are 1?",
        "Print the largest difference between the output and each candidate. One of them is 0.",
        "```python\nout = scaled_dot_product_attention(q, k, v, is_causal=True)\n"
        "for letter, row in candidates.items():\n    print(letter, (out - row).abs().max())\n"
        'one_new_token = "..."\n```',
    ),
    usual_failures=("trusts the flash-attn convention", "does not run the call"),
)
