"""MetaMathQA and GSM8K with the settings of PEFT's method comparison: `python -m benchmarks.metamath`; see `README.md`."""
