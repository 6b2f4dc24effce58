"""Reading the folder of a finished run of `mumoe-tensor train`."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from mumoe_tensor.readers import checked, reading
from mumoe_tensor.training.folder import read_config
from mumoe_tensor.training.head import HeadSetting
from mumoe_tensor.training.settings import Settings, settings_of


def read_run(folder: str | Path) -> tuple[Settings | HeadSetting, nn.Module]:
    """Read the settings and the trained model of a run.

    Parameters
    ----------
    folder : str or Path

    Returns
    -------
    MixerRun, GPT2Run or HeadSetting
    Module
        In evaluation mode, on the CPU.

    Raises
    ------
    ValueError
        If the folder has no finished run, or one of its files is corrupt.
    """
    folder = Path(folder)
    config = folder / "config.json"
    _need(config)
    recorded = dict(read_config(config)["settings"])
    with reading(config):
        if recorded.get("kind") == HeadSetting.kind:
            del recorded["kind"]
            settings: Settings | HeadSetting = checked(HeadSetting, recorded)
        else:
            settings = settings_of(recorded)
    _need(folder / settings.result)
    return settings, settings.load(folder)


def _need(path: Path) -> None:
    if not path.exists():
        raise ValueError(f"{path.parent} must hold a finished run; it has no {path.name}.")
