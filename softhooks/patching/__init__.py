"""Change objects of the user or of other libraries, and undo the changes."""
