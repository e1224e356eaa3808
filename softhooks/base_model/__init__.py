"""The frozen base model: a record of its tensors while a prompt trains, and its fingerprint in a saved prompt."""
