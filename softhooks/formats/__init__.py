"""Prompts on disk: this library's own files, and PEFT's, read and written; nothing in them is trusted unchecked."""
