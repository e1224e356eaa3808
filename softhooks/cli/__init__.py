"""The command line: `softhooks run | demo | inspect | convert | export`."""
