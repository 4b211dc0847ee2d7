"""Commands of `spotlight` that need no trainer and no evaluation: generate, chat, serve, push, doctor."""
