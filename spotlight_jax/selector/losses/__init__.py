"""Losses that teach hash functions which keys a query reads."""
