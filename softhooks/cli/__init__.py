"""The command line: `softhooks run | train | demo | inspect | convert | export`."""
