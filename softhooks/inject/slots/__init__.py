"""Insert virtual tokens into the sequence, in columns that are called slots."""
