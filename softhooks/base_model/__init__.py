"""Record the base model's frozen tensors while a prompt trains, and identify the base model of a saved prompt."""
