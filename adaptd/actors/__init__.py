"""Thin Ray actors over the decode loop and the learner cycle."""
