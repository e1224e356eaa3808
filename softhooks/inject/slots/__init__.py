"""Virtual slots in the sequence, whose rows are the prompt."""
