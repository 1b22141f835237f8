"""Train digits with any update rule in Lightning: the twin of `plain_pytorch.py`.

python examples/lightning_digits.py --rule DeepKernel
"""

import argparse

from lightning.pytorch import Trainer
from plain_pytorch import batches, networks

import lightning_mmd
from lightning_mmd import MMDGAN, UpdateRule


def main(rule: UpdateRule, num_updates: int = 200) -> MMDGAN:
    """Train; return the module. Checkpoints, loggers, callbacks and processes are the Trainer's."""
    generator, critic = networks(rule)
    model = MMDGAN(generator, critic, rule, latents=32)
    trainer = Trainer(
        accelerator="cpu",
        max_steps=num_updates,
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(model, batches())
    return model


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rule", default="ClosedForm")
    main(getattr(lightning_mmd, parser.parse_args().rule)())
