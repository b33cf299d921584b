"""Beside an unmodified vLLM server: the proxy that watches its traffic, and what brings new draft weights in."""
