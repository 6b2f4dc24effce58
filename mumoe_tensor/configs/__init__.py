"""Configs, which the command line imports without torch, and packaged training settings in TOML."""
