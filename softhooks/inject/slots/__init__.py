"""Inject a prompt as virtual tokens in slots of the sequence."""
