"""The exercises of chapter 08, in the order in which they are met."""

from course_lib.flash_attention.exercises import (
    accepts_online_softmax,
    attention_backward,
    bytes_moved,
    causal_tiles,
    first_flash,
    flash_forward,
    merge_states,
    one_pass_variance,
    online_softmax,
    safe_softmax,
    split_decode,
    take_tile,
    tiled_attention,
    two_new_tokens,
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
        bytes_moved.EXERCISE,
        bytes_moved.USELESS_TILE,
        tiled_attention.EXERCISE,
        one_pass_variance.EXERCISE,
        # Core ends here.
        accepts_online_softmax.EXERCISE,
        first_flash.EXERCISE,
        flash_forward.EXERCISE,
        causal_tiles.EXERCISE,
        split_decode.EXERCISE,
        attention_backward.EXERCISE,
        two_new_tokens.EXERCISE,
    ),
)
