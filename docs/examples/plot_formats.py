"""
Formats at one budget
=====================

Compare the same block of experts in every registered format. Formats with a rank have equal
numbers of parameters.
"""

# %%
# What they cost
# --------------
# A block has two layers, 64 → 64 → 10, and 32 experts. The budget is 8,000 parameters,
# including gate and biases. Hadamard, Monarch and the dense tensor have no rank, so their
# size is fixed. Low rank has two factors for every expert, which exceed the budget even at
# rank one.

import matplotlib.pyplot as plt
import torch

import mumoe_tensor as mt
from mumoe_tensor.nn import MuMoEMLP
from mumoe_tensor.study.plots import STYLE, colour
from mumoe_tensor.training import TrainConfig, digits, evaluate, split, train

plt.rcParams.update(STYLE | {"text.parse_math": True})  # powers of ten on the axis
EXPERTS, BUDGET, SEEDS = 32, 8_000, range(3)
sizes = dict(
    experts=EXPERTS, in_features=64, hidden=64, out_features=10, bias=True, gate=True
)
ranks, costs = {}, {}
for name, format in mt.formats().items():
    ranks[name] = (1,) * len(format.bonds(num_levels=1)) or None
    fits = mt.cost(name, rank=ranks[name], **sizes).parameters <= BUDGET
    if ranks[name] and fits:
        ranks[name] = mt.fit_rank(name, parameters=BUDGET, rounding="down", **sizes)
    costs[name] = mt.cost(name, rank=ranks[name], **sizes)
    print(f"{name:13} rank {ranks[name]!s:18} {costs[name].parameters:7,} parameters")

# %%
# What they learn
# ---------------
# Train every block with three seeds, and a dense MLP of the same sizes for comparison. The
# task is easy, so differences of one point do not rank the formats.

rest, test = split(digits(), 0.2)
fit, validation = split(rest, 0.2)


def accuracy(make, seed: int) -> float:
    torch.manual_seed(seed)
    model = make()
    train(
        model,
        fit,
        validation,
        TrainConfig(epochs=12, batch_size=128, learning_rate=0.02, seed=seed),
    )
    return evaluate(model, test)[1]


def mlp():
    return torch.nn.Sequential(
        torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 10)
    )


accuracies = {
    name: [
        accuracy(lambda n=name, r=rank: MuMoEMLP(64, 64, 10, EXPERTS, n, r), seed)
        for seed in SEEDS
    ]
    for name, rank in ranks.items()
}
accuracies["MLP"] = [accuracy(mlp, seed) for seed in SEEDS]
for name, values in accuracies.items():
    mean = sum(values) / len(values)
    print(f"{name:13} accuracy {mean:.1%} (from {min(values):.1%} to {max(values):.1%})")

# %%
# The middle panel shows the rank of the first layer's experts, which are 64 × 64 matrices;
# the second layer has only ten outputs.

names = [*costs, "MLP"]
parameters = [cost.parameters for cost in costs.values()] + [
    mt.dense_parameters(64, 10, hidden=64)
]
expert_ranks = [cost.spec.layers[0].max_expert_rank for cost in costs.values()] + [64]
colours = [colour(name) for name in costs] + ["#000000"]

figure, (size, rank, right) = plt.subplots(
    1, 3, figsize=(7.2, 4.6), layout="constrained", sharey=True
)
size.barh(names, parameters, color=colours)
size.axvline(BUDGET, color="0.3", linewidth=0.8, linestyle="--")
size.set(title="Parameters", xscale="log", xlim=(2e3, 6e5))
rank.barh(names, expert_ranks, color=colours)
rank.set(title="Largest rank of an expert", xlim=(0, 76))
white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
for ax, values in ((size, parameters), (rank, expert_ranks)):
    ax.tick_params(axis="y", length=0)
    for y, value in enumerate(values):
        ax.annotate(
            f"{value:,}",
            (value, y),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            bbox=white,
        )
for y, name in enumerate(names):
    values = [100 * value for value in accuracies[name]]
    right.plot(values, [y] * len(values), "o", color=colours[y], markersize=4, alpha=0.7)
right.tick_params(axis="y", length=0)
right.set(title="Accuracy, three seeds", xlabel="% of the test rows")
size.invert_yaxis()
plt.show()
