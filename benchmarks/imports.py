"""Import time, in a fresh interpreter."""


def timeraw_import() -> str:
    """The code that the interpreter runs."""
    return "import mumoe_tensor"
