"""The exercises of chapter 08, in the order in which they are met."""

from course_lib.flash_attention.exercises import (
    merge_states,
    online_softmax,
    safe_softmax,
    take_tile,
)
from course_lib.grading.exercise import Chapter

CHAPTER = Chapter(
    slug="08_flash_attention",
    title="Why is the exact answer cheaper?",
    exercises=(
        safe_softmax.OVERFLOW_SCORE,
        safe_softmax.SAFE_SOFTMAX,
        online_softmax.EXERCISE,
        take_tile.EXERCISE,
        merge_states.EXERCISE,
    ),
)
