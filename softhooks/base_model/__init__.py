"""Check that the base model stays frozen while a prompt is trained, and identify the base model of a saved prompt."""
