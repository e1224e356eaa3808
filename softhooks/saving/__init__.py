"""`save_pretrained` and checkpoints of a model that carries prompts."""
