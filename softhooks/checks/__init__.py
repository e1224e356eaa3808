"""Checks that run at attach and find out, by running the model, whether it supports a prompt."""
