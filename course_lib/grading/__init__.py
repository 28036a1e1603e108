"""Exercises, checks and verdicts; `exercise.py` holds the record that the rest is made from."""
