"""The frozen base model: a record of its tensors while a prompt trains, and a fingerprint of it in a saved prompt."""
