"""Files of saved prompts, those of softhooks and those of PEFT. Everything that a file says is checked."""
