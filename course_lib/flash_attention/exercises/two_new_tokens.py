"""Exercise: published is not implemented. What `is_causal=True` does with new tokens."""

from __future__ import annotations

from course_lib.grading.exercise import Case, Data, Exercise, Misconception


def measured(data: Data) -> str:
    """Runs the call, and reads off which claim it follows."""
    import torch

    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 1, 2, 8, generator=generator)
    k, v = torch.randn(2, 1, 1, 10, 8, generator=generator)
    attention = torch.nn.functional.scaled_dot_product_attention
    out = attention(q, k, v, is_causal=True)[0, 0, 1]
    seen = {"A": slice(0, 10), "B": slice(8, 10), "C": slice(9, 10), "D": slice(0, 2)}
    rows = {
        letter: attention(q, k[:, :, keys], v[:, :, keys])[0, 0, 1] for letter, keys in seen.items()
    }
    return min(rows, key=lambda letter: float((out - rows[letter]).abs().max()))


EXERCISE = Exercise(
    id="flash_attention.two_new_tokens",
    kind="choice",
    title="Published ≠ implemented: two new tokens",
    task=(
        "A model checks two new tokens at once: two queries, ten keys, of which the last two are "
        "the new tokens' own. Someone calls "
        "`torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)`. Which keys "
        "does query 1, the second one, see? Predict, then measure the distance to each candidate, "
        "then give the letter."
    ),
    why="You check a library's alignment before you trust it with a cache.",
    points=1,
    minutes=4,
    difficulty=2,
    core=False,
    cases=lambda size, seed: [Case("two queries, ten keys, is_causal=True", {})],
    oracle=measured,
    accepts=("D", "D"),
    choices={
        "A": "All ten keys: it is the last token.",
        "B": "Keys 8 and 9: the new tokens.",
        "C": "Key 9: its own.",
        "D": "Keys 0 and 1.",
        "E": "None: the call raises an error, since the score matrix is not square.",
    },
    misconceptions=(
        Misconception(
            "bottom right",
            "A",
            "The mask is 2 × 10, with ones on and below a diagonal. In which corner does it start?",
            "This is what you get where causal masks are aligned at the bottom right, as in the "
            "flash-attn package since 2.1. PyTorch aligns at the top left.",
        ),
        Misconception(
            "new tokens only",
            "B",
            "A causal mask hides what comes later. Does it hide the cache, which came before?",
            "This is what you get when only the new tokens are taken to attend to each other.",
        ),
        Misconception(
            "own key only",
            "C",
            "A causal mask hides what comes later. Does it hide what came before?",
            "This is what you get when causal is read as: only the newest key.",
        ),
        Misconception(
            "an error",
            "E",
            "Did you run it?",
            "This is what you would hope for. The call runs, and returns something.",
        ),
    ),
    hints=(
        "Draw the mask `torch.ones(2, 10).tril()`. Which elements of its second row are 1?",
        "Print the largest difference between row 1 of the output and each candidate. One of "
        "them is 0.",
        "```python\nout = scaled_dot_product_attention(q, k, v, is_causal=True)[0, 0, 1]\n"
        "for letter, row in candidates.items():\n    print(letter, (out - row).abs().max())\n"
        'two_new_tokens = "..."\n```',
    ),
    usual_failures=("trusts the flash-attn convention", "does not run the call"),
)
