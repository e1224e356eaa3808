"""Make prompts work with models that accelerate, PEFT, FSDP2, DeepSpeed or bitsandbytes has changed."""
