"""Inject a prompt's keys and values into calls of the attention function, or through a cache."""
