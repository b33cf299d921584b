"""Logs to traces: readers of what deployments write, one normalised record, the target's judgement of it."""
