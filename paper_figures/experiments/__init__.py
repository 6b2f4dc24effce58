"""Experiments whose tables the figures draw; each follows a protocol in ``docs/experiments``."""
