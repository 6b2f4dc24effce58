"""
What a low expert rank costs
============================

At a fixed budget, more experts mean a smaller rank, which limits the rank of each expert's
matrix. This example measures what a low rank costs.
"""

# %%
# Rank against the number of experts
# ----------------------------------
# A head from 768 features to 1,000 classes has as many parameters as the linear layer,
# including its gate. ``fit_rank`` solves for the rank, and ``cost`` computes the largest
# rank of an expert. No layer is trained.

import matplotlib.pyplot as plt
import torch

import mumoe_tensor as mt
from mumoe_tensor.nn import MuMoE
from mumoe_tensor.study.plots import STYLE, colour
from mumoe_tensor.training import TrainConfig, digits, evaluate, split, train

plt.rcParams.update({**STYLE, "axes.spines.left": True})
FORMATS = ("cp", "tr", "tt", "tucker")
head = dict(in_features=768, out_features=1000, bias=True, gate=True)
counts = (8, 16, 32, 64, 128, 256, 512)
bounds = {name: [] for name in FORMATS}
for name in FORMATS:
    for experts in counts:
        rank = mt.fit_rank(name, experts=experts, **head)
        bounds[name].append(
            mt.cost(name, experts=experts, rank=rank, **head).max_expert_rank
        )
    print(f"{name:7}" + "".join(f"{bound:6}" for bound in bounds[name]))

# %%
# Experts fitted to a trained layer
# ---------------------------------
# Train an MLP on the digits, and replace its middle layer, 128 → 128, with 8 experts that
# are all as close to the linear layer as the format allows. ``fit_errors`` contains the
# error. The model is not trained afterwards, so any loss of accuracy is due to the rank.

rest, test = split(digits(), 0.2)
fit, validation = split(rest, 0.2)
torch.manual_seed(0)
middle = torch.nn.Linear(128, 128)
model = torch.nn.Sequential(
    torch.nn.Linear(64, 128),
    torch.nn.GELU(),
    middle,
    torch.nn.GELU(),
    torch.nn.Linear(128, 10),
)
train(model, fit, validation, TrainConfig(epochs=20, batch_size=64, learning_rate=0.01))
intact = evaluate(model, test)[1]
print(f"accuracy of the MLP: {intact:.1%}")


layer_sizes = dict(experts=8, in_features=128, out_features=128, bias=True, gate=True)


def held(name: str, rank) -> tuple[int, float, float, int]:
    """Rank of an expert, error of the fit, accuracy with the layer, its parameters."""
    layer = MuMoE.from_linear(middle, 8, format=name, rank=rank)
    model[2] = layer.eval()
    accuracy = evaluate(model, test)[1]
    cost = mt.cost(name, rank=rank, **layer_sizes)
    return cost.max_expert_rank, layer.fit_errors[0], accuracy, cost.parameters


ranks = {
    "cp": (2, 4, 8, 16, 32, 64, 128),
    "tr": [(2, 2, r) for r in (1, 2, 4, 8, 16, 32, 64)],
    "tt": [(2, r) for r in (2, 4, 8, 16, 32, 64, 128)],
    "tucker": [(2, r, r) for r in (2, 4, 8, 16, 32, 64, 128)],
}
found = {name: [held(name, rank) for rank in ranks[name]] for name in FORMATS}
for bound, error, accuracy, parameters in found["cp"]:
    print(
        f"rank {bound:3}: error {error:5.1%}, accuracy {accuracy:.1%}, size {parameters:,}"
    )

# %%
# Left: the closed form. Middle: the error. The experts of every format reach the error of
# the best matrix of their rank, so all points are on one line, which the singular values
# determine. Right: the accuracy. The formats need different numbers of parameters for a
# rank.

augmented = torch.cat([middle.weight, middle.bias[:, None]], 1).detach().double()
values = torch.linalg.svdvals(augmented)
best = [100 * float(values[rank:].norm() / values.norm()) for rank in range(129)]

figure, (bound, error, right) = plt.subplots(1, 3, figsize=(7.2, 3.1), layout="constrained")
error.plot(range(129), best, color="0.7", label="best matrix of the rank")
for name, size in zip(FORMATS, (7, 5.5, 4, 2.5), strict=True):
    style = {"color": colour(name), "markersize": size, "linewidth": 1}
    bound.plot(counts, bounds[name], "o-", label=name, **style)
    at, errors, accuracies, parameters = zip(*found[name], strict=True)
    error.plot(at, [100 * value for value in errors], "o", **style)
    right.plot(parameters, [100 * value for value in accuracies], "o-", **style)
right.axhline(100 * intact, color="0.3", linewidth=0.8, linestyle="--")
bound.set_xscale("log", base=2)
bound.set_xticks(counts[::2], [str(n) for n in counts[::2]])
bound.set(
    title="Head at a fixed budget", xlabel="experts", ylabel="largest rank of an expert"
)
error.set(
    title="One layer", xlabel="largest rank of an expert", ylabel="error of the fit, %"
)
right.set(
    title="Model with this layer", xlabel="parameters of the layer", ylabel="accuracy, %"
)
right.set_xscale("log")
right.set_xticks([2_000, 5_000, 10_000, 30_000], ["2k", "5k", "10k", "30k"])
right.minorticks_off()
for ax in (bound, error):
    ax.set_ylim(bottom=0)
figure.legend(loc="outside lower center", ncols=5, frameon=False)
plt.show()
