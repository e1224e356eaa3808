"""How well prompts tune real models: `python -m benchmarks.quality`."""
