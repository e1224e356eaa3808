"""The version of softhooks."""

__version__ = "0.2.0"
