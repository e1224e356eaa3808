"""Layouts, which define where virtual tokens are inserted in a text."""
