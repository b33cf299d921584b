"""One small reader a format: `matches` says whether a row is of it, `read` gives what the row holds."""
