"""Beside an unmodified vLLM server: watch its traffic, bring new draft weights in."""
