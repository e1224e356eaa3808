"""The frozen base: which tensors must not change, their digests, and the fingerprint in a saved prompt."""
