"""Bases that other libraries have wrapped, quantized, offloaded or sharded."""
