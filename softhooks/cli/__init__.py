"""The command line: `softhooks train | run | demo | inspect | compare | doctor | convert | export`."""
