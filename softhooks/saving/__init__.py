"""`save_pretrained` and checkpoints of a model with prompts."""
