"""Online adaptation of the draft model of a speculative-decoding deployment."""

__version__ = "0.1.0"
