"""Attributes, functions and hooks that are set on other people's objects, and put back."""
