"""Data sets and a small trainer, shared by the study and the experiments."""

from mumoe_tensor.configs.training import TrainConfig
from mumoe_tensor.readers import read_text
from mumoe_tensor.training.checkpoint import DamagedCheckpoint
from mumoe_tensor.training.data import (
    Dataset,
    Rows,
    digits,
    read_idx,
    read_images,
    read_npz,
    split,
)
from mumoe_tensor.training.features import extract, write_npz
from mumoe_tensor.training.log import Evaluation
from mumoe_tensor.training.trainer import cross_entropy, evaluate, train

__all__ = [
    "DamagedCheckpoint",
    "Dataset",
    "Evaluation",
    "Rows",
    "TrainConfig",
    "cross_entropy",
    "digits",
    "evaluate",
    "extract",
    "read_idx",
    "read_images",
    "read_npz",
    "read_text",
    "split",
    "train",
    "write_npz",
]
