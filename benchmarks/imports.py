"""Import time, in a fresh interpreter."""


def timeraw_import() -> str:
    """What the interpreter runs."""
    return "import mumoe_tensor"
