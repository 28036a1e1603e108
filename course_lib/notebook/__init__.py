"""What a notebook shows: cards, figures, questions, labs and the learner's progress."""
