"""Experiments of the papers on real data, one module each. The docs contain their protocols and commands."""
