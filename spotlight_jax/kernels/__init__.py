"""Ops: one folder each, with a public function, its meaning in plain JAX, its backends and the shapes it must serve."""
