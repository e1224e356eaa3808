"""Inject a prompt's keys and values at the attention function or through a cache."""
