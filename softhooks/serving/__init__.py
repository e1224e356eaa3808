"""Serve prompts: embeddings for inference servers, and a folder that stores the prompts of one base model."""
