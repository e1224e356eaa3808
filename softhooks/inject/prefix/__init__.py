"""Keys and values of a prompt at the attention function or in a cache."""
