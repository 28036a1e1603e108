"""Exercises, checks and verdicts. `exercise.py` holds the record that everything else is made from."""
