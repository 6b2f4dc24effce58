"""The extras of this package, and the optional dependencies that they install."""

from __future__ import annotations

from importlib.util import find_spec

#: Optional packages under their import names, by the extra that installs them.
EXTRAS = {
    "cli": ("typer", "rich"),
    "torch": ("torch",),
    "jax": ("jax",),
    "train": (
        "accelerate",
        "filelock",
        "jinja2",
        "joblib",
        "pydantic",
        "safetensors",
        "tensorboardX",
        "tokenizers",
    ),
    "timm": ("timm", "torchvision"),
    "transformers": ("safetensors", "transformers"),
    "experiments": ("fairlearn", "pandas", "efficientnet_lite_pytorch", "gguf"),
    "study": ("matplotlib", "PIL", "plotly", "sklearn"),
}


def missing(package: str) -> str | None:
    """How to install a missing package, given its import name; None if no extra installs it."""
    for extra, packages in EXTRAS.items():
        if package.partition(".")[0] in packages:
            return f"{package.partition('.')[0]} is not installed; pip install 'mumoe_tensor[{extra}]'."
    return None


def require(*extras: str) -> None:
    """Check that all packages of some extras are installed.

    Raises
    ------
    ModuleNotFoundError
        If a package is missing; the message names the package and the extra.
    """
    for extra in extras:
        for package in EXTRAS[extra]:
            if find_spec(package) is None:
                raise ModuleNotFoundError(missing(package), name=package)


def check_torchvision() -> None:
    """Check that torchvision can be imported if it is installed, since timm and transformers then import it.

    Raises
    ------
    ImportError
        If its build does not match that of torch.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"torchvision, which timm and transformers import, must match the build of torch; got: {error}. "
            "Install both from the same index, or uninstall torchvision."
        ) from error
