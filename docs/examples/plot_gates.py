"""
How sparse gates are
====================

A gate computes coefficients from logits. With all gates in this example they are at least
zero and sum to one, but different numbers of them are zero.
"""

# %%
# One row of logits
# -----------------
# With softmax, every coefficient is positive. With entmax15 and sparsemax, experts below a
# threshold have a coefficient of zero; the threshold depends on all logits of the row. With
# top-k, the k largest coefficients are positive, whatever the logits.

import matplotlib.pyplot as plt
import numpy as np

import mumoe_tensor as mt
from mumoe_tensor.study.plots import STYLE

plt.rcParams.update({**STYLE, "axes.spines.left": True})
GATES = {
    "softmax": (mt.softmax, "#000000"),
    "entmax15": (mt.entmax15, "#0072B2"),
    "sparsemax": (mt.sparsemax, "#D55E00"),
    "top-8": (lambda logits: mt.top_k(logits, 8), "#009E73"),
}
rng = np.random.default_rng(0)
logits = np.sort(2 * rng.standard_normal(64))[::-1]

for name, (gate, _) in GATES.items():
    a = gate(logits)
    print(
        f"{name:9} {np.count_nonzero(a):2} of 64 are nonzero, the largest is {a.max():.3f}"
    )

# %%
# Left: the coefficients of the 16 largest logits. Right: one logit varies while seven
# others are zero. The coefficient of a sparse gate is zero up to a threshold, where its
# slope is continuous only for entmax15.

figure, (bars, moved) = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained")
for k, (name, (gate, colour)) in enumerate(GATES.items()):
    places = np.arange(16) + 0.2 * k - 0.3
    bars.bar(places, gate(logits)[:16], width=0.2, color=colour, label=name)
bars.set(
    xlabel="experts by their logit",
    ylabel="coefficient",
    title="64 experts, the 16 largest logits",
)
bars.set_xticks([0, 5, 10, 15], ["1", "6", "11", "16"])
bars.legend(frameon=False)

x = np.linspace(-4, 4, 400)
rows = np.zeros((len(x), 8))
rows[:, 0] = x
for name in ("softmax", "entmax15", "sparsemax"):
    gate, colour = GATES[name]
    moved.plot(x, gate(rows)[:, 0], color=colour)
moved.set(
    xlabel="its logit, with seven others at 0",
    ylabel="coefficient",
    title="One expert of eight",
)

# %%
# Scale of the logits
# -------------------
# With batch norm or layer norm, the logits have a standard deviation near one at the start
# of training, so the sparsity of a new layer depends on the number of experts. Larger
# logits make the coefficients sparser.

counts = [16, 64, 256, 1024, 4096]
figure, axes = plt.subplots(1, 2, figsize=(7.2, 3), layout="constrained", sharey=True)
for ax, scale in zip(axes, (1, 3), strict=True):
    for name, (gate, colour) in GATES.items():
        used = [
            np.count_nonzero(gate(scale * rng.standard_normal((200, n)))) / 200
            for n in counts
        ]
        ax.plot(counts, used, "o-", color=colour, markersize=3, label=name)
        if scale == 1 and name in ("entmax15", "sparsemax"):
            print(f"{name}: {used[-1]:.0f} of 4,096 experts, {used[-1] / 4096:.1%}")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="experts",
        title=f"Normal logits of standard deviation {scale}",
    )
axes[0].set_ylabel("nonzero coefficients")
axes[0].legend(frameon=False)
plt.show()
