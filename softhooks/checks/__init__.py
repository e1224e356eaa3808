"""Checks at attach: what a prompt needs of a model, found by running it."""
