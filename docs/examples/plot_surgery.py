"""
Put layers into an existing model
=================================

Replace the MLP blocks of a small transformer with blocks of experts that start with the
same outputs, and continue training.
"""

# %%
# The model
# ---------
# The model cuts an image into 16 patches of 2 × 2 pixels. Its MLP blocks are modules with a
# name, which the replacement needs.

import copy

import matplotlib.pyplot as plt
import torch
from torch import Tensor, nn

from mumoe_tensor.analysis import Usage, watch_coefficients
from mumoe_tensor.nn import replace_mlp
from mumoe_tensor.study.plots import STYLE, colour
from mumoe_tensor.training import TrainConfig, digits, evaluate, split, train

plt.rcParams.update({**STYLE, "axes.spines.left": True})


class Block(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norms[0](x)
        x = x + self.attention(normed, normed, normed, need_weights=False)[0]
        return x + self.mlp(self.norms[1](x))


class Reader(nn.Module):
    def __init__(self, width: int = 32, depth: int = 2):
        super().__init__()
        self.patches = nn.Conv2d(1, width, 2, stride=2)
        self.positions = nn.Parameter(0.02 * torch.randn(16, width))
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.patches(x.reshape(-1, 1, 8, 8)).flatten(2).transpose(1, 2)
        return self.head(self.blocks(patches + self.positions).mean(1))


rest, test = split(digits(), 0.2)
fit, validation = split(rest, 0.2)
config = TrainConfig(epochs=8, batch_size=64, learning_rate=0.01)
torch.manual_seed(0)
model = Reader()
before = train(model, fit, validation, config)
print(f"accuracy {evaluate(model, test)[1]:.1%}")

# %%
# What would change
# -----------------
# A pattern selects the blocks. With ``dry_run=True`` the model does not change. A rank of
# (4, 4, 9) allows experts of rank 4 · 9 = 36, enough for the old matrices of 33 rows,
# including the bias.

options = dict(experts=32, format="tr", rank=(4, 4, 9), gate_norm="layer")
for planned in replace_mlp(model, "blocks.*.mlp", dry_run=True, **options):
    print(planned)

# %%
# Replace the blocks
# ------------------
# The errors of weights and outputs are rounding errors. The gate of a new block is
# initialised at random, which has no effect while all experts are equal. A copy of the
# model keeps its MLPs, for comparison.

plain = copy.deepcopy(model)
for done in replace_mlp(model, "blocks.*.mlp", **options):
    print(done)
with torch.no_grad():
    difference = (model(test.x) - plain(test.x)).abs().max()
print(f"largest difference of an output: {difference:.1e}")

# %%
# Continue training
# -----------------
# The two models are not comparable in accuracy: the model with experts has more parameters,
# and this is one seed of an easy task. The purpose of the experts is to be inspected.

runs = {"with experts": (model, colour("tr")), "with MLPs": (plain, "#000000")}
after = {}
for name, (each, _) in runs.items():
    after[name] = train(each, fit, validation, config)
    print(f"{name}: accuracy {evaluate(each, test)[1]:.1%}")

usage = {}


def count(name: str, coefficients: tuple[Tensor, ...]) -> None:
    usage.setdefault(name, Usage(experts=32)).update(coefficients[0])


with watch_coefficients(model, count), torch.no_grad():
    model(test.x)
used = {name: found.statistics() for name, found in usage.items()}
for name, found in used.items():
    print(f"{name}: {found.dead} dead, a patch uses {32 * found.active:.1f} of 32 experts")

# %%
# Left: the validation loss. Right: the use of each expert, from most to least.

figure, (loss, shares) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
epochs = range(1, len(before) + 1)
loss.plot(epochs, [epoch.validation_loss for epoch in before], color="0.6", label="before")
for name, history in after.items():
    later = [len(before) + epoch.epoch for epoch in history]
    loss.plot(
        later, [epoch.validation_loss for epoch in history], color=runs[name][1], label=name
    )
loss.set(title="Loss", xlabel="epoch", ylabel="validation loss", ylim=(0, None))
loss.legend(frameon=False)
for (name, found), style in zip(used.items(), ("-", "--"), strict=True):
    shares.plot(
        range(1, 33),
        found.mean.sort(descending=True).values,
        style,
        color=colour("tr"),
        label=name,
    )
shares.axhline(1 / 32, color="0.3", linewidth=0.8, linestyle=":", label="1/32")
shares.set(
    title="Use of the experts",
    xlabel="experts, the most used first",
    ylabel="mean coefficient",
)
shares.set_ylim(bottom=0)
shares.legend(frameon=False)
plt.show()
