"""Training objectives in addition to, or in place of, the loss of the model."""
