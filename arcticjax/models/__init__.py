"""Encoders as pure functions, what they are, and where their weights and tokenizers come from."""
