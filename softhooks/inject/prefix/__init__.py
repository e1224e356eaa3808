"""Inject a prompt's keys and values into calls to the attention function, or through a cache."""
