"""Beside a vLLM server: the proxy that sees its traffic, and what brings new drafts into it."""
