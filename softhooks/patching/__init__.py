"""Set attributes, functions and hooks on objects of the user or of other libraries, and restore the originals."""
