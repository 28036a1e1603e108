"""The exercises of chapter 00, in the order in which they are met."""

from course_lib.grading.exercise import Chapter
from course_lib.start_here.exercises import (
    masked_add,
    matmul,
    other_for_product,
    past_the_end,
    ragged_copy,
    row_softmax,
    row_sum,
    warm_up,
)

CHAPTER = Chapter(
    slug="00_start_here",
    title="What does a kernel do with memory?",
    exercises=(
        warm_up.EXERCISE,
        past_the_end.EXERCISE,
        masked_add.EXERCISE,
        row_sum.EXERCISE,
        other_for_product.EXERCISE,
        row_softmax.EXERCISE,
        ragged_copy.EXERCISE,
        matmul.EXERCISE,
    ),
)
