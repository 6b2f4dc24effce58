"""
Train a head and look at its experts
====================================

Train a layer of 16 experts to classify digits, and see which experts are used for which
digits.
"""

# %%
# Train it
# --------
# `.MuMoE` replaces ``torch.nn.Linear(64, 10)``. Validation rows choose the best epoch, and
# test rows are used only at the end.

import matplotlib.pyplot as plt
import torch

from mumoe_tensor.analysis import Labels, Usage
from mumoe_tensor.nn import MuMoE
from mumoe_tensor.study.plots import STYLE, colour
from mumoe_tensor.training import TrainConfig, digits, evaluate, split, train

rest, test = split(digits(), 0.2)
fit, validation = split(rest, 0.2)

torch.manual_seed(0)
model = MuMoE(64, 10, experts=16, format="cp", rank=32)
train(model, fit, validation, TrainConfig(epochs=20, batch_size=64, learning_rate=0.01))

_, accuracy = evaluate(model, test)
print(f"{accuracy:.1%} of {len(test)} digits are classified correctly")

# %%
# How much are experts used?
# --------------------------
# The coefficients of an input are zero for most experts and sum to one. `.Usage` and
# `.Labels` accumulate statistics of them over batches.

with torch.no_grad():
    _, (coefficients,) = model(test.x, return_coefficients=True)

usage, labels = Usage(experts=16), Labels(experts=16, classes=10)
usage.update(coefficients)
labels.update(coefficients, test.y)
used, known = usage.statistics(), labels.statistics()
print(f"{used.dead} experts are never used; an input uses {16 * used.active:.1f} of 16")
print(
    f"the labels of an expert's inputs have {known.ratio:.0%} of the entropy of all labels"
)

# %%
# Most experts are used for one digit or two, and a digit may have several experts. Each
# column of the right panel sums to one.

plt.rcParams.update(STYLE)
by_digit = torch.stack([coefficients[test.y == digit].mean(0) for digit in range(10)], 1)

figure, (bars, map) = plt.subplots(
    1, 2, figsize=(7.2, 3.4), layout="constrained", width_ratios=(1, 1.5)
)
bars.barh(range(16), used.mean, color=colour("cp"))
bars.axvline(1 / 16, color="0.3", linewidth=0.8, linestyle="--")
bars.annotate(
    "1/16",
    (1 / 16, -0.6),
    xytext=(3, 0),
    textcoords="offset points",
    color="0.3",
    va="bottom",
)
bars.set(title="Mean coefficient", ylabel="expert", yticks=range(16), ylim=(15.6, -1.4))
image = map.imshow(by_digit, cmap="Blues", vmin=0, aspect="auto")
map.set(
    title="Mean coefficient by digit", xlabel="digit", xticks=range(10), yticks=range(16)
)
figure.colorbar(image, ax=map, label="mean coefficient")

# %%
# What are experts used for?
# --------------------------
# The figure shows the six images with the largest coefficients of each expert. The numbers
# are the largest and the sixth-largest coefficient.

top = coefficients.topk(6, dim=0)
figure, axes = plt.subplots(8, 2, figsize=(7.2, 4.6), layout="constrained")
for expert, ax in enumerate(axes.T.flat):
    images = test.x[top.indices[:, expert]].reshape(6, 8, 8)
    strip = torch.cat([torch.nn.functional.pad(image, (1, 1)) for image in images], 1)
    ax.imshow(strip, cmap="gray_r", vmin=0, vmax=1)
    ax.set_ylabel(f"expert {expert}", rotation=0, ha="right", va="center")
    high, low = float(top.values[0, expert]), float(top.values[5, expert])
    ax.text(1.03, 0.5, f"{high:.2f} … {low:.2f}", transform=ax.transAxes, va="center")
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
plt.show()
