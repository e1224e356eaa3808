"""`softhooks train`: train a prompt on a table of texts with a plain Trainer, from the rows of a file to a report."""
