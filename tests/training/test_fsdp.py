"""A training whose weights are divided among processes (FSDP2) is the training of one process.

Accelerate uses FSDP2 on accelerators only. Told that its processes have some, it does the same on CPUs, over
gloo: that is what runs here, with the settings that ``accelerate launch --use_fsdp`` hands over.
"""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")
pytest.importorskip("safetensors")
pytest.importorskip("tensorboardX")

from forked import leave, start  # noqa: E402

from mumoe_tensor.models import GPT2, GPT2Config, Mixer, MixerConfig  # noqa: E402
from mumoe_tensor.training import Dataset, TrainConfig, train  # noqa: E402

CONFIG = TrainConfig(
    steps=6, batch_size=8, accumulation=2, learning_rate=0.01, evaluate_every=3, checkpoint_every=2
)
#: As `accelerate launch` sets them for its options.
FSDP2 = dict(
    ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_AUTO_WRAP_POLICY="TRANSFORMER_BASED_WRAP",
    FSDP_RESHARD_AFTER_FORWARD="true",
)  # fmt: skip


def gpt2() -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = dict(vocabulary=31, context=8, width=16, depth=2, heads=2, hidden=24)
    model = GPT2(GPT2Config(**sizes, format="tr", experts=(4, 3), rank=(2, 2, 2, 3))).double()
    tokens = torch.randint(31, (40, 9))
    return model, Windows(tokens)


def mixer() -> tuple[Any, Any]:
    torch.manual_seed(0)
    sizes = dict(image_size=8, patch=4, width=12, depth=2, token_hidden=6, channel_hidden=10, classes=3)
    ranks = dict(token_rank=(3,), channel_rank=(5,))
    model = Mixer(MixerConfig(**sizes, format="cp", experts=(5,), **ranks)).double()
    return model, Dataset(torch.rand(40, 8, 8).double(), torch.arange(40) % 3)


class Windows:
    """Tokens, and those that follow them."""

    def __init__(self, tokens: Any):
        self.tokens = tokens

    def __len__(self) -> int:
        return len(self.tokens)

    def batch(self, rows: Any) -> tuple[Any, Any]:
        return self.tokens[rows, :-1], self.tokens[rows, 1:]


class Stopping:
    """Rows of which the last are asked for in vain."""

    def __init__(self, data: Any, batches: int):
        self.data, self.left = data, batches

    def __len__(self) -> int:
        return len(self.data)

    def batch(self, rows: Any) -> tuple[Any, Any]:
        if not self.left:
            raise KeyboardInterrupt
        self.left -= 1
        return self.data.batch(rows)


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), ACCELERATE_USE_CPU="true", **FSDP2,
    )  # fmt: skip
    from accelerate.state import DistributedType, PartialState
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

    assert PartialState(cpu=True).num_processes == 2

    def use(kind: DistributedType) -> None:
        # (Once for each training: accelerate takes processes that had FSDP2 for ones without settings of it.)
        PartialState._shared_state["distributed_type"] = kind

    # Begun under DDP, and under FSDP2.
    for make, block, first in (
        (gpt2, "GPT2Block", DistributedType.MULTI_CPU),
        (mixer, "MixerBlock", DistributedType.MULTI_GPU),
    ):
        os.environ["FSDP_TRANSFORMER_CLS_TO_WRAP"] = block
        place = Path(folder, make.__name__)
        model, data = make()
        # Stopped in the fifth step, of two batches each.
        use(first)
        with contextlib.suppress(KeyboardInterrupt):
            train(model, Stopping(data, 9), data, CONFIG, folder=place)
        assert len(list((place / "checkpoints").iterdir())) > 0
        model, data = make()
        use(DistributedType.MULTI_GPU)
        history = train(model, data, data, CONFIG, folder=place)
        assert all(hasattr(p, "full_tensor") for p in model.parameters()), "it was not divided"
        whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        if rank == 0:
            losses = [[e.loss, e.validation_loss] for e in history]
            torch.save([whole, losses], place / "end.pt")
    leave()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_divided_weights_end_as_whole_ones(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    start(worker, port, str(tmp_path))
    for make in (gpt2, mixer):
        model, data = make()
        history = train(model, data, data, CONFIG)
        state, losses = torch.load(tmp_path / make.__name__ / "end.pt", weights_only=True)
        for name, value in model.state_dict().items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-9)
        for mine, other in zip([[e.loss, e.validation_loss] for e in history], losses, strict=True):
            assert mine == pytest.approx(other, rel=1e-9)
