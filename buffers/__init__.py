"""The replay buffer: what was served, kept for learning. Stores, never chooses; imports nothing else of adaptd."""
