"""The version of softhooks."""

__version__ = "0.1.0"
