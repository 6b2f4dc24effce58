"""Measurements: interleaved timing, peak memory, and a description of the machine."""
