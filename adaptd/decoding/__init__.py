"""Batched, lossless speculative decoding with a ragged key-value cache, for any Hugging Face causal language model."""
