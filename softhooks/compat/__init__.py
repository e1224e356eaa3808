"""What accelerate, PEFT, FSDP2, DeepSpeed and bitsandbytes do to a model, and how prompts work with it."""
