"""Change objects that belong to the user or to other libraries, and undo the changes."""
