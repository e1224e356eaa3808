"""The model card of a prompt: the `README.md` of its repository on the Hub."""
