"""Where virtual tokens, anchors and text stand: as a template over fields, or put into batches that are tokenized already."""
