"""Long-context LLM decoding that reads only the cached tokens that matter, in JAX."""
