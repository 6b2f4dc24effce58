"""Real data and one small trainer, for the study and the experiments."""

from mumoe_tensor.training.data import Dataset, digits, read_idx, read_npz, read_text, split
from mumoe_tensor.training.features import extract, write_npz
from mumoe_tensor.training.trainer import Epoch, TrainConfig, evaluate, train

__all__ = [
    "Dataset",
    "Epoch",
    "TrainConfig",
    "digits",
    "evaluate",
    "extract",
    "read_idx",
    "read_npz",
    "read_text",
    "split",
    "train",
    "write_npz",
]
