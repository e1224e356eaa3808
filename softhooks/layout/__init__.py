"""Where virtual tokens are inserted in a text: as in a template, or next to tokens of tokenized text."""
