"""Models in evaluations: opened once, run with any method, what their queries read counted in one way."""
