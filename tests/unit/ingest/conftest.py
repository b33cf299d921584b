"""The tiny pair of the learning tests."""

from tests.unit.learning.conftest import decode, draft, target

__all__ = ["decode", "draft", "target"]
