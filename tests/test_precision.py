"""Precision, torch.compile and strategies: the same mathematics, or a clear refusal."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import FSDPStrategy
from tiny import gan, quiet_trainer
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    Batch,
    ClosedForm,
    DeepKernel,
    EmbeddingCritic,
    FeatureMatching,
    GradientAscent,
    Lagged,
    LearnedKernelCritic,
    SlopePenalty,
    Split,
)
from lightning_mmd.networks import MLPFeatures, MLPGenerator
from lightning_mmd.objectives import Hinge, Logistic

# torch.compile looks at attributes that torch itself warns of.
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")

RULES = [ClosedForm, GradientAscent]


def lagged(rule):
    return {"estimator": Lagged()} if rule is GradientAscent else {}


def make_model(rule=ClosedForm, **kwargs):
    torch.manual_seed(0)
    critic = LearnedKernelCritic(MLPFeatures(2, 16, (16,)), 16)
    kwargs = {"alpha": 1.0, "beta": 0.1} | kwargs
    return gan(MLPGenerator(2, 3, (16,)), critic, rule, latents=draw, **kwargs)


def draw(num):
    """Latents that are the same in every precision."""
    return torch.randn(num, 3, dtype=torch.float64)


class Listen(Callback):
    """Keeps the gradients that the critic's optimizer is given."""

    def on_fit_start(self, trainer, pl_module):
        self.gradients = []
        trainer.optimizers[1].register_step_pre_hook(self.keep)

    def keep(self, optimizer, *_):
        parameters = optimizer.param_groups[0]["params"]
        self.gradients.append(torch.cat([p.grad.flatten() for p in parameters]))


def train(model, path, num_steps=3, ckpt_path=None, **kwargs):
    trainer = quiet_trainer(path, max_steps=num_steps, **kwargs)
    real = torch.randn(16, 2, generator=torch.Generator().manual_seed(1))
    trainer.fit(model, DataLoader(real, batch_size=16), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def largest_difference(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("64-true", torch.float64, 1e-6),
        ("bf16-mixed", torch.float32, 3e-3),
        ("bf16-true", torch.bfloat16, None),
    ],
)
def test_precisions_train_alike(precision, dtype, tolerance, rule, tmp_path):
    torch.set_default_dtype(torch.float32)
    one, other, start = (make_model(rule, **lagged(rule)) for _ in range(3))
    train(one, tmp_path, precision="32-true")
    train(other, tmp_path, precision=precision)
    assert {p.dtype for p in other.parameters()} == {dtype}
    assert largest_difference(one, start) > 3e-3
    if tolerance is not None:
        assert largest_difference(one, other) < tolerance


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("name", ["default", "plain GAN with R1", "deep kernel", "with norm"])
def test_other_rules_train_alike_in_every_precision(name, precision, tmp_path):
    torch.set_default_dtype(torch.float32)
    # Adam would turn the rounding of a gradient that is zero into a step
    optimizers = dict.fromkeys(
        ("generator_optimizer", "critic_optimizer"), lambda own: torch.optim.SGD(own, 0.05)
    )

    def make():
        torch.manual_seed(0)
        features = MLPFeatures(2, 16, (16,))
        if name == "deep kernel":
            return MMDGAN(
                MLPGenerator(2, 3, (16,)),
                EmbeddingCritic(features, 16, 4, spectral_norm=False),
                DeepKernel(slope=SlopePenalty(0.1, at="real"), alpha=0.1),
                latents=draw,
                **optimizers,
            )
        critic = LearnedKernelCritic(features, 16)
        rule = {
            "default": None,
            "plain GAN with R1": GradientAscent(
                0.0, 0.0, Logistic(), slope=SlopePenalty(1.0, at="real")
            ),
            "with norm": GradientAscent(0.1, 0.1, Hinge(), matching=FeatureMatching(2.0)),
        }[name]
        return MMDGAN(MLPGenerator(2, 3, (16,)), critic, rule, latents=draw, **optimizers)

    one, other, start = make(), make(), make()
    train(one, tmp_path, precision="32-true")
    train(other, tmp_path, precision=precision)
    assert largest_difference(one, start) > 1e-3
    assert largest_difference(one, other) < (1e-5 if precision == "64-true" else 2e-2)


@pytest.mark.parametrize("estimator", [Batch(), Split()])
def test_the_penalty_keeps_its_digits_under_bf16_mixed(estimator, tmp_path):
    """The part of the critic's gradient that alpha multiplies: float32's, to float32's rounding."""
    torch.set_default_dtype(torch.float32)

    def gradient(precision, alpha):
        listen = Listen()
        model = make_model(GradientAscent, alpha=alpha, estimator=estimator)
        train(model, tmp_path, 1, precision=precision, callbacks=[listen])
        return listen.gradients[0]

    parts = {p: gradient(p, 200.0) - gradient(p, 100.0) for p in ("32-true", "bf16-mixed")}
    size = parts["32-true"].norm()
    assert (parts["bf16-mixed"] - parts["32-true"]).norm() < 1e-5 * size
    whole = {p: gradient(p, 1.0) for p in ("32-true", "bf16-mixed")}
    assert not torch.equal(whole["bf16-mixed"], whole["32-true"])  # autocast was on


def test_tf32_is_the_users_choice(tmp_path):
    def flags():
        matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
        return matmul.allow_tf32, cudnn.allow_tf32, torch.get_float32_matmul_precision()

    before = flags()
    train(make_model(), tmp_path, 1)
    assert flags() == before


def compile_generator(model):
    model.generator = torch.compile(model.generator, backend="aot_eager")


def compile_critic(model):
    model.critic = torch.compile(model.critic, backend="aot_eager")


def compile_in_place(model):
    for module in (model.generator, model.critic, model.critic.features):
        module.compile(backend="aot_eager")


@pytest.mark.parametrize(
    ("rule", "compile_part"),
    [
        (ClosedForm, compile_generator),
        (ClosedForm, compile_in_place),
        (GradientAscent, compile_critic),
        (GradientAscent, compile_in_place),
    ],
)
def test_compiled_networks_train_alike(rule, compile_part, tmp_path):
    plain, compiled = make_model(rule), make_model(rule)
    compile_part(compiled)
    train(plain, tmp_path, 2)
    trainer = train(compiled, tmp_path, 2)
    assert largest_difference(plain, compiled) < 1e-12
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    names = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert list(names) == list(plain.state_dict())
    for resumed in (plain, compiled):  # what was saved compiled
        torch.nn.init.constant_(resumed.generator.layers[0].weight, 7.0)
        train(resumed, tmp_path, 3, ckpt_path=tmp_path / "a.ckpt")
    assert largest_difference(plain, compiled) < 1e-12


@pytest.mark.parametrize("rule", RULES)
def test_a_compiled_lightning_module_is_run_uncompiled(rule, tmp_path):
    plain, compiled = make_model(rule), make_model(rule)
    train(plain, tmp_path, 2)
    with pytest.warns(UserWarning, match=r"Compile the networks instead"):
        train(torch.compile(compiled, backend="aot_eager"), tmp_path, 2)
    assert largest_difference(plain, compiled) == 0


def test_compilation_is_used_where_it_can_be(tmp_path):
    """The plain passes of an adversarial step run compiled, the penalty's do not."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(len(inputs))
        return graph.forward

    model = make_model(GradientAscent)
    model.critic.compile(backend=backend)
    train(model, tmp_path, 1)
    assert compiled
    assert model.critic_step == 1


def test_sharding_is_refused():
    model = make_model()
    model._trainer = SimpleNamespace(strategy=FSDPStrategy(), world_size=2)
    with pytest.raises(ValueError, match=r"FSDPStrategy shards parameters.*Use strategy='ddp'"):
        model.setup("fit")


@pytest.mark.parametrize("rule", RULES)
def test_validation_runs_under_bf16_mixed(rule, tmp_path):
    torch.set_default_dtype(torch.float32)
    trainer = quiet_trainer(tmp_path, precision="bf16-mixed", max_epochs=None)
    held_out = DataLoader(torch.randn(16, 2), batch_size=16)
    (metrics,) = trainer.validate(make_model(rule), held_out, verbose=False)
    assert abs(metrics["val/gap"]) > 0
