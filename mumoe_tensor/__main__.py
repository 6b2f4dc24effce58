"""``python -m mumoe_tensor``: the command line."""

from mumoe_tensor.cli import app

app()
