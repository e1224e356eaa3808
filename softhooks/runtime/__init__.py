"""What runs while prompts are attached: state, hooks, and the choice of what a forward does."""
