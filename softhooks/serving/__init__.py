"""Embed text together with a soft prompt, for inference servers."""
