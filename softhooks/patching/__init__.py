"""Patches that set attributes, functions and hooks on objects of other libraries or the user, and restore the originals."""
