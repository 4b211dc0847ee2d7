"""A server that decodes many requests at once, over OpenAI's API."""
