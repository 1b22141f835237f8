"""Small models and quiet trainers, made in one place."""

from dataclasses import fields

import torch
from lightning.pytorch import Trainer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_mmd import MMDGAN, Batch, ClosedForm, GradientAscent


def gan(generator, critic, rule=ClosedForm, kind=MMDGAN, **kwargs):
    """Make a model; arguments of the rule and of the module may be mixed.

    ``rule`` is a class. `GradientAscent` has the plain estimator here, and samples of their own for
    each step, unless they are given: most tests compare with the penalty of one batch.
    """
    if rule is GradientAscent:
        kwargs.setdefault("estimator", Batch())
        kwargs.setdefault("share_samples", False)
    names = {field.name for field in fields(rule) if field.init}
    arguments = {name: kwargs.pop(name) for name in names & kwargs.keys()}
    return kind(generator, critic, rule(**arguments), **kwargs)


def closed_form(generator, critic, **kwargs):
    """Make a model with the rule `ClosedForm`."""
    return gan(generator, critic, ClosedForm, **kwargs)


def ascent(generator, critic, **kwargs):
    """Make a model with the rule `GradientAscent`."""
    return gan(generator, critic, GradientAscent, **kwargs)


def quiet_trainer(path, **kwargs):
    """Make a trainer on the CPU that writes and shows nothing unless it is asked to."""
    defaults = {
        "accelerator": "cpu",
        "max_epochs": -1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": path,
    }
    return Trainer(**(defaults | kwargs))


class NoDouble(TorchDispatchMode):
    """A device without float64, such as Apple's MPS: whatever makes float64 of float32 fails."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given, made = (
            {leaf.dtype for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}
            for tree in ((args, kwargs), result)
        )
        if torch.float32 in given and torch.float64 in made:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return result
