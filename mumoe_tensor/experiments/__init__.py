"""Experiments of the papers on real data, each a module: protocol in the docs, a command to run it."""
