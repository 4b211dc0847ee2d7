"""Training of the hash functions."""
