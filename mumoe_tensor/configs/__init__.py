"""Configs that the command line reads without torch, and in TOML the settings of models to train."""
