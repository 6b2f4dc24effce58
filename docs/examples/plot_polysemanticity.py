"""
Remove experts
==============

Removing an expert changes the accuracy of the classes that use it. Polysemanticity measures
how far experts are from affecting a single class; the baseline is a gate that draws experts
at random.
"""

# %%
# Without one expert
# ------------------
# Train a layer of 32 experts on the digits. `.ablation_effects` removes one expert after
# another, and returns the change in the accuracy of every class.

import matplotlib.pyplot as plt
import torch

from mumoe_tensor.analysis import ablate, ablation_effects, polysemanticity
from mumoe_tensor.nn import MuMoE
from mumoe_tensor.study.plots import STYLE, colour
from mumoe_tensor.training import TrainConfig, digits, evaluate, split, train

plt.rcParams.update({**STYLE, "axes.spines.left": True})
rest, test = split(digits(), 0.4)
fit, validation = split(rest, 0.2)


def trained(experts: int, seed: int = 0) -> MuMoE:
    torch.manual_seed(seed)
    model = MuMoE(64, 10, experts, format="cp", rank=32)
    train(
        model,
        fit,
        validation,
        TrainConfig(epochs=15, batch_size=64, learning_rate=0.01, seed=seed),
    )
    return model


model = trained(32)
batch = [(test.x, test.y)]
effects = ablation_effects(model, model, batch, classes=10)
worst = int(effects.min(1).values.argmin())
print(f"accuracy {evaluate(model, test)[1]:.1%} with all experts")
with ablate(model, [worst]):
    print(f"accuracy {evaluate(model, test)[1]:.1%} without expert {worst}")

# %%
# Red means that the class loses accuracy. Right: the same with a gate that assigns the
# coefficients of an input to random experts. This model is less accurate, and its experts
# do not specialise.

baseline = ablation_effects(model, model, batch, classes=10, random_seed=0)
limit = float(torch.maximum(effects.abs().max(), baseline.abs().max()))
figure, axes = plt.subplots(1, 2, figsize=(7.2, 4.4), layout="constrained", sharey=True)
for ax, changes, title in zip(
    axes, (effects, baseline), ("Trained gate", "Random gate"), strict=True
):
    image = ax.imshow(
        100 * changes, cmap="RdBu", vmin=-100 * limit, vmax=100 * limit, aspect="auto"
    )
    ax.set(title=title, xlabel="digit", xticks=range(10), yticks=range(0, 32, 4))
axes[0].set_ylabel("removed expert")
figure.colorbar(image, ax=axes, label="change in accuracy, points")

# %%
# Polysemanticity
# ---------------
# `.polysemanticity` is 0 for an expert that affects a single class. It also depends on the
# number of experts and on the sparsity of the gate, even for a random gate, so compare it
# with the random gate. The figure shows layers with 8 to 128 experts.

counts = (8, 16, 32, 64, 128)
own, random = [], []
for experts in counts:
    model = trained(experts)
    own.append(float(polysemanticity(ablation_effects(model, model, batch, 10)).nanmean()))
    of_seeds = [
        polysemanticity(
            ablation_effects(model, model, batch, 10, random_seed=seed)
        ).nanmean()
        for seed in range(3)
    ]
    random.append(float(sum(of_seeds) / 3))
    print(f"{experts:3} experts: {own[-1]:.2f}, with a random gate {random[-1]:.2f}")

figure, ax = plt.subplots(figsize=(4.6, 3), layout="constrained")
ax.plot(counts, own, "o-", color=colour("cp"), label="trained gate")
ax.plot(counts, random, "s--", color="0.5", label="random gate, mean of 3 seeds")
ax.set_xscale("log", base=2)
ax.set_xticks(counts, [str(n) for n in counts])
ax.set(xlabel="experts", ylabel="mean polysemanticity", ylim=(0, 1.1))
ax.legend(frameon=False)
plt.show()
