"""Describe saved prompts, alone, on their model and next to each other, and find out which prompts a model allows."""
