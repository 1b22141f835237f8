# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Quickstart
#
# Digits on a CPU in about two minutes, a callback for somebody's GAN, and a training that proves
# that it descends. Nothing is downloaded: the 8x8 digits come with scikit-learn.
#
# `pip install "lightning-mmd[plots]"`

# %%
import csv
import logging
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.loggers import CSVLogger
from torchvision.utils import make_grid

from lightning_mmd import (
    MMDGAN,
    ClosedForm,
    GeneratorEMA,
    LearnedKernelCritic,
    MMDTracker,
    ParametricGradientPenalty,
    RationalQuadratic,
)
from lightning_mmd.data import DigitsDataModule
from lightning_mmd.networks import ConvFeatures, ConvGenerator

warnings.filterwarnings("ignore")
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
QUIET = {
    "accelerator": "cpu",
    "devices": 1,
    "max_epochs": -1,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "enable_checkpointing": False,
}
STEPS = 600

# %% [markdown]
# ## 1. Draw digits
#
# A generator, features for the critic, and nothing else: the rule that draws best is the default.


# %%
def networks():
    """Return a generator and a critic for 8x8 pictures."""
    shape = (1, 8, 8)
    generator = ConvGenerator(sample_shape=shape, latent_dim=32, channels=(32, 16))
    features = ConvFeatures(sample_shape=shape, num_features=256, channels=(16, 32), activated=True)
    return generator, LearnedKernelCritic(features, num_features=256)


def show(*batches, titles):
    """Show the first 64 pictures of each batch, which have values in [-1, 1]."""
    figure, axes = plt.subplots(1, len(batches), figsize=(4 * len(batches), 4))
    for axis, batch, title in zip(axes, batches, titles, strict=True):
        picture = make_grid((batch[:64] + 1) / 2, nrow=8, padding=1).clamp(0, 1)
        axis.imshow(picture.permute(1, 2, 0), interpolation="nearest")
        axis.set_title(title)
        axis.set_axis_off()
    return figure


seed_everything(0)
data = DigitsDataModule(batch_size=32)
model = MMDGAN(*networks(), latents=32)
kernel = RationalQuadratic(alpha=1.0, bandwidth=8.0)
tracker = MMDTracker(kernel, every_n_steps=STEPS // 3)
trainer = Trainer(max_steps=STEPS, callbacks=[GeneratorEMA(), tracker], logger=False, **QUIET)
trainer.fit(model, datamodule=data)
real = next(iter(data.train_dataloader()))
real = torch.cat([real, next(iter(data.val_dataloader()))])
show(real, model.sample(64), titles=("real", f"generated after {STEPS} updates"))
print("MMD^2 to held-out digits:", [round(entry["mmd2"], 4) for entry in tracker.history])
print("between real digits:     ", round(tracker.floor, 4))

# %% [markdown]
# ## 2. One callback for somebody's GAN
#
# `TutorialGAN` in `examples/drop_in.py` is Lightning's own tutorial GAN. Its code stays as it is;
# the penalty is a callback that is told the names of its two networks. Compare the two MMD^2.

# %%
from drop_in import train

penalty = ParametricGradientPenalty(
    alpha=10, generator="generator", critic="discriminator", critic_values=torch.logit
)
for name, callbacks in (("as it is:         ", ()), ("with the callback:", (penalty,))):
    curve, _ = train(0, STEPS, *callbacks)
    print(f"{name} MMD^2 {curve[-1]:.4f}, over the second half {sum(curve[5:]) / 5:.4f}")

# %% [markdown]
# ## 3. A descent that is certified
#
# `ClosedForm` solves for the best critic at every update. Before each step it predicts how much
# F = MMD^2 / 2 of the batch will fall, after it how much it fell. Near 1 their ratio says that the
# generator follows the gradient flow of the theorem.

# %%
seed_everything(0)
logger = CSVLogger("runs", name="quickstart")
certified = MMDGAN(*networks(), ClosedForm(beta=0.1), latents=32)
trainer = Trainer(max_steps=STEPS // 10, logger=logger, log_every_n_steps=1, **QUIET)
trainer.fit(certified, datamodule=DigitsDataModule(batch_size=128))
with open(Path(logger.log_dir) / "metrics.csv") as file:
    rows = [row for row in csv.DictReader(file) if row.get("certificate/ratio")]
steps = [int(row["step"]) for row in rows]
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.semilogy(steps, [float(row["certificate/objective"]) for row in rows])
left.set(xlabel="generator updates", title="F = MMD^2 / 2 in the critic's features")
right.plot(steps, [float(row["certificate/ratio"]) for row in rows])
right.axhline(1, color="gray", linestyle=":")
right.set(xlabel="generator updates", title="realised over predicted descent", ylim=(0, 1.2))
