"""A server of many requests at once, over the API that everyone's client speaks."""
