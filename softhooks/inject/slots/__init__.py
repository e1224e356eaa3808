"""Insert virtual tokens into the sequence, at places that are called slots."""
