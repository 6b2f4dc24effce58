"""What torchvision, and so timm, needs to be imported beside another build of torch than its own."""

from __future__ import annotations

import importlib.util
from contextlib import suppress
from pathlib import Path
from typing import Any


def define_operators() -> Any:
    """Define the operators that torchvision lacks, before it is imported; None where it is not installed.

    Its own are used where they load. The definitions go with the object that is returned.
    """
    import torch

    actual = importlib.util.find_spec("torchvision")
    if actual is None or actual.origin is None:
        return None
    with suppress(OSError):
        torch.ops.load_library(Path(actual.origin).parent / "_C.so")
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library
