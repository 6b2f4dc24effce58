"""Which extra brings a package that is missing."""

from __future__ import annotations

from importlib.util import find_spec

#: The packages that are imported, by the extra that brings them.
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
    """What to install for a package; None for one that no extra brings.

    Parameters
    ----------
    package : str
        As it is imported.
    """
    for extra, packages in EXTRAS.items():
        if package.partition(".")[0] in packages:
            return f"{package.partition('.')[0]} is not installed; pip install 'mumoe_tensor[{extra}]'."
    return None


def require(*extras: str) -> None:
    """Check that everything an extra brings is installed, before any work.

    Parameters
    ----------
    *extras : str

    Raises
    ------
    ModuleNotFoundError
        That names the package and the extra.
    """
    for extra in extras:
        for package in EXTRAS[extra]:
            if find_spec(package) is None:
                raise ModuleNotFoundError(missing(package), name=package)


def check_torchvision() -> None:
    """Check that torchvision, which timm and transformers import where it is installed, can be imported.

    Raises
    ------
    ImportError
        If it is of another build than torch.
    """
    if find_spec("torchvision") is None:
        return
    try:
        import torchvision  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise ImportError(
            f"torchvision must fit torch, which timm and transformers import; it says: {error}. Install both "
            "from one index, or uninstall torchvision."
        ) from error
