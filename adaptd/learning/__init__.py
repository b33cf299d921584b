"""Turning traces into a better draft: batches, the optimiser, exact evaluation, and the cycle sample-learn-gate-publish."""
