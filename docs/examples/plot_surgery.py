"""
Put layers into a model that exists
===================================

A small transformer reads digits. Its MLP blocks become blocks of experts that start as they
are, so nothing is lost; then the experts part.
"""

# %%
# Someone else's model
# --------------------
# It cuts an image into 16 patches of 2 x 2 pixels. All it takes for what follows is that
# the MLP blocks are modules with a name.

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
print(f"{evaluate(model, test)[1]:.1%} right")

# %%
# What would change
# -----------------
# A pattern names the blocks. With ``dry_run=True`` nothing happens to the model. A rank of
# (4, 4, 9) allows for experts of rank 4 · 9 = 36, so they can be the old matrices of 33
# rows, bias counted.

options = dict(experts=32, format="tr", rank=(4, 4, 9), gate_norm="layer")
for planned in replace_mlp(model, "blocks.*.mlp", dry_run=True, **options):
    print(planned)

# %%
# Change it
# ---------
# The errors of weights and outputs are those of rounding. The gate of a new block is drawn
# at random: whatever it says, a mixture of equal experts is that expert. A copy keeps its
# MLPs, to compare with.

plain = copy.deepcopy(model)
for done in replace_mlp(model, "blocks.*.mlp", **options):
    print(done)
with torch.no_grad():
    difference = (model(test.x) - plain(test.x)).abs().max()
print(f"largest difference of an output: {difference:.1e}")

# %%
# Train both on
# -------------
# This is no comparison of the two: the model with experts has more parameters, and it is
# one seed of an easy task. What experts add is something to look at.

runs = {"with experts": (model, colour("tr")), "with its MLPs": (plain, "#000000")}
after = {}
for name, (each, _) in runs.items():
    after[name] = train(each, fit, validation, config)
    print(f"{name}: {evaluate(each, test)[1]:.1%} right")

usage = {}


def count(name: str, coefficients: tuple[Tensor, ...]) -> None:
    usage.setdefault(name, Usage(experts=32)).update(coefficients[0])


with watch_coefficients(model, count), torch.no_grad():
    model(test.x)
used = {name: found.statistics() for name, found in usage.items()}
for name, found in used.items():
    print(f"{name}: {found.dead} dead, a patch uses {32 * found.active:.1f} of 32 experts")

# %%
# On the left the loss of the validation rows, on the right how much each expert is used,
# from most to least.

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
