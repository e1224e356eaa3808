"""Training objectives that add to, or replace, the model's own loss."""
