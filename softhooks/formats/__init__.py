"""Read and write saved prompts in softhooks' own format and in PEFT's; every value read from a file is checked."""
