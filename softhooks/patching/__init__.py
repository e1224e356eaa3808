"""Attributes and functions of other objects, replaced and put back."""
