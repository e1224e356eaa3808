"""The frozen base model: the record of its tensors while a prompt trains, and its fingerprint in a saved prompt."""
