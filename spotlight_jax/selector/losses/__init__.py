"""Losses of hash functions."""
