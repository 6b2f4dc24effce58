"""Measurements: times in turns, peak memory, and the machine they belong to."""
