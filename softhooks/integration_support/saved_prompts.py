"""Saved prompts, and their conversion to and from PEFT adapters."""

from softhooks.formats import peft_read, peft_write
from softhooks.formats.find import find
from softhooks.formats.stored import StoredPrompt, outline
from softhooks.load import attach_stored
