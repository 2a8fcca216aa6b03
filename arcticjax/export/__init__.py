"""The sentence-transformers folder that a trained encoder leaves in, and the certificate that it
is right."""
