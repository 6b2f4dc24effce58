"""
Take experts away
=================

A class suffers if an expert that is there for it is taken away. How far are experts from
being there for one class? And how far would they be if the gate drew them at random?
"""

# %%
# Without one expert
# ------------------
# Layers with 8 to 128 experts are trained on the digits. `.ablation_effects` takes the
# experts of a layer away one after the other, and tells how the accuracy of every class
# changes.

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
print(f"{evaluate(model, test)[1]:.1%} right with all experts")
with ablate(model, [worst]):
    print(f"{evaluate(model, test)[1]:.1%} right without expert {worst}")

# %%
# Red: the class suffers. On the right the same with a gate that gives the coefficients of
# an input to experts drawn at random. Its model is worse to begin with, and no expert is
# there for anything.

baseline = ablation_effects(model, model, batch, classes=10, random_seed=0)
limit = float(torch.maximum(effects.abs().max(), baseline.abs().max()))
figure, axes = plt.subplots(1, 2, figsize=(7.2, 4.4), layout="constrained", sharey=True)
for ax, changes, title in zip(
    axes, (effects, baseline), ("Its own gate", "A random gate"), strict=True
):
    image = ax.imshow(
        100 * changes, cmap="RdBu", vmin=-100 * limit, vmax=100 * limit, aspect="auto"
    )
    ax.set(title=title, xlabel="digit", xticks=range(10), yticks=range(0, 32, 4))
axes[0].set_ylabel("expert taken away")
figure.colorbar(image, ax=axes, label="change of the accuracy, points")

# %%
# One figure an expert
# --------------------
# `.polysemanticity` is 0 for an expert whose removal concerns one class alone. It depends
# on how many experts there are and on how sparse the gate is, even if the gate knows
# nothing. So it says something only beside the random gate.

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
ax.plot(counts, own, "o-", color=colour("cp"), label="its own gate")
ax.plot(counts, random, "s--", color="0.5", label="a random gate, mean of 3 seeds")
ax.set_xscale("log", base=2)
ax.set_xticks(counts, [str(n) for n in counts])
ax.set(xlabel="experts", ylabel="mean polysemanticity", ylim=(0, 1.1))
ax.legend(frameon=False)
plt.show()
