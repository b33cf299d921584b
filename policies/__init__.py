"""Decisions as pure functions and small state machines: no I/O, no clock, no logging; generators are passed in."""
