"""Benchmarks of adaptation: one stream of requests, several learners side by side."""
