"""The exercises of chapter 08, in the order in which they are met."""

from course_lib.flash_attention.exercises import online_softmax
from course_lib.grading.exercise import Chapter

CHAPTER = Chapter(
    slug="08_flash_attention",
    title="Why is the exact answer cheaper?",
    exercises=(online_softmax.EXERCISE,),
)
