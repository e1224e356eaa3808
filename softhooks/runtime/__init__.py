"""The runtime of attached prompts: their state, the hooks, and the choice of how each forward uses prompts."""
