"""Experiments of the papers on real data, one module each; the docs have the protocol and the command."""
