"""`softhooks demo`: train, save, load and compare prompts on real text."""
