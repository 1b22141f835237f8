import copy
import csv
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from tiny import ascent, closed_form, gan, quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    ClosedForm,
    DivergedError,
    Gaussian,
    GradientAscent,
    Lagged,
    LearnedKernelCritic,
    RandomFourierFeatures,
    TrustRegion,
    mmd2_unbiased,
    parametric_gradient,
)
from lightning_mmd.critic_warnings import KinkedCriticWarning
from lightning_mmd.networks import MLPFeatures, MLPGenerator
from lightning_mmd.passes import seeded

RULES = [ClosedForm, GradientAscent]
CPU = torch.device("cpu")


def ring(num):
    angles = torch.arange(num) * 2 * torch.pi / 8
    return torch.stack([angles.cos(), angles.sin()], 1) + 0.05 * torch.randn(num, 2)


def make_model(rule=ClosedForm, **kwargs):
    torch.manual_seed(0)
    critic = LearnedKernelCritic(MLPFeatures(2, 16, (16,)), 16)
    kwargs = {"latents": 3, "alpha": 1.0, "beta": 0.1} | kwargs
    return gan(MLPGenerator(2, 3, (16,)), critic, rule, **kwargs)


def loader(num=64, batch_size=16):
    torch.manual_seed(1)
    return DataLoader(ring(num), batch_size=batch_size)


def trainer(max_steps, tmp_path, **kwargs):
    return quiet_trainer(tmp_path, max_steps=max_steps, **({"log_every_n_steps": 1} | kwargs))


class CountSteps(Callback):
    """Count the real steps of each optimizer, below Lightning."""

    def on_fit_start(self, trainer, pl_module):
        self.counts = [0] * len(trainer.optimizers)
        for index, optimizer in enumerate(trainer.optimizers):
            optimizer.register_step_post_hook(lambda *_, index=index: self._count(index))

    def _count(self, index):
        self.counts[index] += 1


@pytest.mark.parametrize("rule", RULES)
def test_max_steps_counts_generator_updates(rule, tmp_path):
    count, checkpoints = (
        CountSteps(),
        ModelCheckpoint(tmp_path, every_n_train_steps=7, save_top_k=-1),
    )
    model = make_model(rule, critic_steps=5)
    fit = trainer(20, tmp_path, callbacks=[count, checkpoints], enable_checkpointing=True)
    fit.fit(model, loader())
    assert count.counts == [20, 100]
    assert fit.global_step == 20
    assert (model.critic_step, model.images_seen) == (100, 1600)
    assert sorted(path.stem.split("-")[1] for path in tmp_path.glob("*.ckpt")) == [
        "step=14",
        "step=7",
    ]


def test_scalars_are_logged_on_the_axis_of_generator_updates(tmp_path):
    logger = CSVLogger(tmp_path)
    model = make_model(GradientAscent, critic_steps=2)
    trainer(6, tmp_path, logger=logger).fit(model, loader())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["critic/gap"]]
    assert {int(row["step"]) for row in rows} == set(range(7))
    assert [float(row["critic_step"]) for row in rows][-1] == 12
    last = {name: float(value) for name, value in rows[-1].items() if value}
    assert last["images_seen"] == 192
    assert last["cumulative_lr"] == pytest.approx(6 * 5e-4)
    gap, penalty, rkhs = (
        last[f"critic/{name}"] for name in ("gap", "parametric_penalty", "rkhs_penalty")
    )
    total = abs(gap) + penalty / 2 + 0.05 * rkhs
    assert last["critic/parametric_share"] == pytest.approx(penalty / 2 / total)
    assert last["critic/rkhs_share"] == pytest.approx(0.05 * rkhs / total)
    assert last["critic/parametric_gradient_norm"] == pytest.approx(penalty**0.5)
    assert last["generator/gradient_norm"] > 0
    assert last["critic/gradient_norm"] > 0


def test_a_closed_form_update_is_the_formula(tmp_path):
    """One update against a dense solve by explicit Jacobians."""
    real = ring(16)
    model = make_model(max_iterations=50, tolerance=1e-12)
    model.critic.weights.data.zero_()
    before = copy.deepcopy(model)
    trainer(1, tmp_path).fit(model, DataLoader(real, batch_size=16))
    with seeded(CPU, 0, 0, 0):
        z = before.sample_latents(16)
    parameters = dict(before.generator.named_parameters())

    def embedding(values):
        return before.critic.embed(torch.func.functional_call(before.generator, values, z)).mean(0)

    blocks = torch.func.jacrev(embedding)(parameters)
    jacobian = torch.cat([block.reshape(16, -1) for block in blocks.values()], 1)
    gap = before.critic.embed(real).mean(0) - embedding(parameters)
    w = torch.linalg.solve(jacobian @ jacobian.T + 0.1 * torch.eye(16), gap)
    torch.testing.assert_close(model.critic.weights.data, w, rtol=1e-8, atol=1e-10)
    moved = nn.utils.parameters_to_vector(model.generator.parameters())
    start = nn.utils.parameters_to_vector(before.generator.parameters())
    scale = model.rule.state_dict()["scale"]  # power iteration sees at most lambda_max
    largest = torch.linalg.eigvalsh((jacobian @ jacobian.T).detach()).max()
    natural = 1 + 0.1 / float(largest)
    assert natural - 1e-12 <= scale == pytest.approx(natural, rel=1e-3)
    step = (0.4 * scale * jacobian.T @ w).detach()
    torch.testing.assert_close(moved - start, step, rtol=1e-8, atol=1e-10)
    # The features moved by Adam along the gradient of <w, delta> - 1/2 ||J^T w||^2 with w held.
    features = before.critic.features
    objective = w.detach() @ (before.critic.embed(real).mean(0) - embedding(parameters))
    slope = torch.autograd.grad(
        w.detach() @ embedding(parameters), list(parameters.values()), create_graph=True
    )
    objective = objective - 0.5 * sum(g.square().sum() for g in slope)
    optimizer = torch.optim.Adam(features.parameters(), lr=5e-4, betas=(0.0, 0.9))
    for p, g in zip(
        features.parameters(),
        torch.autograd.grad(-objective, list(features.parameters())),
        strict=True,
    ):
        p.grad = g
    optimizer.step()
    for ours, theirs in zip(model.critic.features.parameters(), features.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("alpha", [1.0, 10.0])
def test_the_certificate_compares_with_the_theorem(alpha, tmp_path):
    """For small steps the realised change is the predicted one, to first order in the step."""
    discrepancies, lengths = [], []
    for eta in (2e-3, 1e-3):
        model = make_model(
            alpha=alpha, beta=0.1 * alpha, eta=eta, max_iterations=60, tolerance=1e-12
        )
        logger = CSVLogger(tmp_path, version=f"{alpha}-{eta}")
        trainer(3, tmp_path, logger=logger).fit(model, loader(16))
        with open(f"{logger.log_dir}/metrics.csv") as file:
            rows = [row for row in csv.DictReader(file) if row["certificate/ratio"]]
        assert len(rows) == 3
        for row in rows:
            ratio, theorem, predicted, objective, mmd2 = (
                float(row[name])
                for name in (
                    "certificate/ratio",
                    "certificate/theorem",
                    "certificate/predicted",
                    "certificate/objective",
                    "witness/mmd2",
                )
            )
            assert 0.98 < ratio < 1.0
            assert theorem == pytest.approx(predicted, rel=1e-5)
            assert predicted < 0
            assert objective == pytest.approx(mmd2 / 2, rel=1e-6)
            speed = float(row["certificate/speed"])
            step = float(row["certificate/step"])
            assert step * speed**2 == pytest.approx(-predicted, rel=1e-5)
            assert step > eta * alpha  # by eta beta / lambda_max
        discrepancies.append(1 - float(rows[0]["certificate/ratio"]))
        # The length is that of the steps made; speed times step is its limit of first order.
        flow = sum(float(row["certificate/step"]) * float(row["certificate/speed"]) for row in rows)
        lengths.append(abs(model.rule.path_length / flow - 1))
    assert lengths[0] < 2e-3
    assert lengths[0] / lengths[1] == pytest.approx(2.0, rel=0.1)
    assert discrepancies[0] / discrepancies[1] == pytest.approx(2.0, rel=0.02)


def test_an_adversarial_update_is_the_formula(tmp_path):
    """One update against naive double backward and plain optimizers."""
    real = ring(16)
    model = make_model(GradientAscent, alpha=3.0, beta=0.2)
    twin = copy.deepcopy(model)
    trainer(1, tmp_path).fit(model, DataLoader(real, batch_size=16))
    with seeded(CPU, 0, 0, 0):
        z, fresh = twin.sample_latents(16), twin.sample_latents(16)
    critic, generator = twin.critic, twin.generator
    gap = critic(real).mean() - critic(generator(z)).mean()
    slope = torch.autograd.grad(
        critic(generator(z)).mean(), list(generator.parameters()), create_graph=True
    )
    loss = -gap + 1.5 * sum(g.square().sum() for g in slope) + 0.1 * critic.rkhs_norm2()
    gradients = torch.autograd.grad(loss, list(critic.parameters()))
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
    for p, g in zip(critic.parameters(), gradients, strict=True):
        p.grad = g
    optimizer.step()
    optimizer = torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.0, 0.9))
    optimizer.zero_grad()
    (-critic(generator(fresh)).mean()).backward(inputs=list(generator.parameters()))
    optimizer.step()
    for ours, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def test_closed_form_descends_on_fixed_features(tmp_path):
    critic = LearnedKernelCritic(nn.Identity(), 2, RandomFourierFeatures(Gaussian(0.7), 2, 128))
    torch.manual_seed(0)
    model = closed_form(
        MLPGenerator(2, 3, (32, 32)), critic, latents=3, beta=0.03, eta=0.3, max_iterations=8
    )
    held_out = ring(400)
    start = mmd2_unbiased(held_out, model.sample(400, model.fixed_latents(400)), Gaussian(0.5))
    trainer(120, tmp_path).fit(model, loader(512, 256))
    end = mmd2_unbiased(held_out, model.sample(400, model.fixed_latents(400)), Gaussian(0.5))
    assert end < start / 20
    assert model.critic_step == 120
    generator, critic = model._bare_players()  # the critic has nothing to train: one optimizer
    assert generator.parameters
    assert not critic.parameters


@pytest.mark.parametrize("rule", RULES)
def test_resume_goes_on_bit_for_bit(rule, tmp_path):
    """Six updates at once against two, a checkpoint, and four more; global seeds differ.

    Every batch is the same, since Lightning begins an epoch anew when a plain loader is resumed.
    """
    data = loader(16)
    kwargs = {"critic_steps": 2}
    if rule is GradientAscent:
        kwargs["estimator"] = Lagged()
    kwargs["generator_scheduler"] = lambda o: torch.optim.lr_scheduler.StepLR(o, 2, gamma=0.5)
    through = make_model(rule, **kwargs)
    seed_everything(5, verbose=False)
    trainer(6, tmp_path).fit(through, data)
    first = make_model(rule, **kwargs)
    seed_everything(6, verbose=False)
    half = trainer(2, tmp_path)
    half.fit(first, data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    second = make_model(rule, **kwargs)
    for p in second.parameters():
        nn.init.constant_(p, 7.0)
    seed_everything(7, verbose=False)
    trainer(6, tmp_path).fit(second, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    for (name, p), q in zip(through.named_parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q), name
    assert through.cumulative_lr == second.cumulative_lr
    assert through.critic_step == second.critic_step == 12


def test_training_leaves_the_global_random_state(tmp_path):
    model = make_model(GradientAscent)
    model.generator.layers.append(nn.Dropout(0.1))
    batches = [ring(16)]
    before = torch.get_rng_state()
    trainer(1, tmp_path).fit(
        model, DataLoader(batches, batch_size=None, generator=torch.Generator())
    )
    assert torch.equal(before, torch.get_rng_state())


def test_latents_depend_on_seed_rank_and_step(tmp_path):
    model = make_model()
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    draws = []
    for key in keys:
        with seeded(CPU, *key):
            draws.append(model.sample_latents(4))
    for i in range(4):
        for j in range(i):
            assert not torch.equal(draws[i], draws[j])
    with seeded(CPU, 0, 0, 0):
        assert torch.equal(draws[0], model.sample_latents(4))


@pytest.mark.parametrize("rule", RULES)
def test_a_module_built_in_python_resumes_and_loads_with_its_networks(rule, tmp_path):
    model = make_model(rule)
    fit = trainer(3, tmp_path)
    fit.fit(model, loader())
    fit.save_checkpoint(tmp_path / "a.ckpt")
    fresh = make_model(rule)
    loaded = MMDGAN.load_from_checkpoint(
        tmp_path / "a.ckpt", generator=fresh.generator, critic=fresh.critic, rule=fresh.rule
    )
    assert loaded.rule == model.rule
    assert loaded.hparams["latents"] == 3
    assert loaded.critic_step == 3
    latents = model.fixed_latents(5)
    assert torch.equal(loaded.sample(5, latents), model.sample(5, latents))


@pytest.mark.parametrize("frozen", [False, True])
def test_frozen_parameters_stay(frozen, tmp_path):
    model = make_model(GradientAscent)
    first = model.generator.layers[0]
    first.weight.requires_grad_(not frozen)
    start = first.weight.detach().clone()
    trainer(2, tmp_path).fit(model, loader())
    assert torch.equal(first.weight, start) == frozen


def test_clipping_bounds_the_step(tmp_path):
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=1.0)  # noqa: E731
    model = make_model(GradientAscent, generator_optimizer=sgd, generator_clip_norm=1e-3)
    start = nn.utils.parameters_to_vector(model.generator.parameters()).detach().clone()
    trainer(1, tmp_path).fit(model, loader())
    moved = nn.utils.parameters_to_vector(model.generator.parameters()).detach() - start
    assert float(moved.norm()) == pytest.approx(1e-3, rel=1e-6)


def test_sample_is_reproducible_and_restores_modes():
    model = make_model()
    dropout = nn.Dropout(0.5)
    dropout.eval()
    model.generator.layers.append(nn.Sequential(nn.Dropout(0.9), dropout))
    torch.manual_seed(3)
    first = model.sample(6)
    torch.manual_seed(3)
    assert torch.equal(first, model.sample(6))
    assert not first.requires_grad
    assert model.generator.layers[-1][0].training
    assert not dropout.training


def test_custom_latents(tmp_path):
    model = make_model(latents=lambda n: torch.rand(n, 3))
    z = model.fixed_latents(100)
    assert 0 <= z.min() < z.max() <= 1
    trainer(2, tmp_path).fit(model, loader())


def test_lagged_direction_is_the_last_mean_gradient(tmp_path):
    model = make_model(GradientAscent, estimator=Lagged())
    trainer(1, tmp_path).fit(model, loader())
    twin = make_model(GradientAscent, estimator=Lagged())
    twin.critic.load_state_dict(model.critic.state_dict())
    with seeded(CPU, 0, 0, 0):
        twin.sample_latents(16)
        fresh = twin.sample_latents(16)
    expected = parametric_gradient(twin.critic, twin.generator, fresh)
    torch.testing.assert_close(model.rule.estimator.direction, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"alpha": -1.0}, "alpha must be a finite number >= 0, got -1"),
        ({"beta": -0.1}, "beta must be"),
        ({"alpha": 0.0, "beta": 0.0}, "needs alpha > 0 or beta > 0"),
        ({"critic_steps": 0}, "critic_steps must be a positive"),
        ({"eta": float("nan")}, "eta must be"),
        ({"latents": 0}, "latents must have a positive length, got 0"),
        ({"rule": GradientAscent, "method": "forwrd"}, "method must be one of forward"),
        ({"rule": GradientAscent, "fraction": 0.0}, "fraction must be in"),
        ({"max_iterations": 0}, "max_iterations must be a positive"),
        ({"overhead": -1.0}, "overhead must be"),
        ({"micro_batches": 0}, "micro_batches must be a positive"),
        ({"generator_clip_norm": 0.0}, "generator_clip_norm must be"),
    ],
)
def test_bad_arguments_are_named(kwargs, message):
    with pytest.raises(ValueError, match=message):
        make_model(**kwargs)


def test_critics_that_do_not_suit_are_refused():
    generator, critic = MLPGenerator(2, 3), MLPFeatures(2, 1)
    with pytest.raises(TypeError, match="LearnedKernelCritic"):
        closed_form(generator, critic, latents=3)
    with pytest.raises(TypeError, match="RKHS norm"):
        ascent(generator, critic, latents=3, beta=0.1)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"latents": 5}, ValueError, "does not take latents of shape \\(2, 5\\)"),
        ({"data": lambda: torch.randn(16, 3)}, ValueError, "samples of shape \\(3,\\)"),
        ({"data": lambda: torch.full((16, 2), torch.nan)}, ValueError, "holds? NaN"),
        ({"data": lambda: torch.ones(16, 2, dtype=torch.long)}, TypeError, "floating-point"),
        ({"precision": "16-mixed"}, ValueError, "bf16-mixed"),
    ],
)
@pytest.mark.parametrize("rule", RULES)
def test_misfits_stop_before_anything_moves(change, error, message, rule, tmp_path):
    data = change.get("data", lambda: ring(16))()
    arguments = {k: v for k, v in change.items() if k not in ("data", "precision")}
    model = make_model(rule, **arguments)
    start = copy.deepcopy(model.state_dict())
    fit = trainer(1, tmp_path)
    if "precision" in change:
        fit.strategy.precision_plugin.precision = "16-mixed"
    with pytest.raises(error, match=message):
        fit.fit(model, DataLoader(data, batch_size=16))
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name]), name


def test_a_critic_of_wrong_shape_is_named(tmp_path):
    model = ascent(MLPGenerator(2, 3), MLPFeatures(2, 4), latents=3, beta=0.0)
    with pytest.raises(ValueError, match=r"one value a sample.*got \(2, 4\)"):
        trainer(1, tmp_path).fit(model, loader())


def test_divergence_is_named(tmp_path):
    model = make_model(GradientAscent)
    model.critic.weights.data.fill_(1e308)
    with pytest.raises(DivergedError, match="training has diverged"):
        trainer(1, tmp_path).fit(model, loader())


def test_relu_critics_are_warned_of(tmp_path):
    critic = LearnedKernelCritic(nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Linear(8, 4)), 4)
    model = closed_form(MLPGenerator(2, 3), critic, latents=3, beta=0.1)
    with pytest.warns(KinkedCriticWarning, match="ReLU"):
        trainer(1, tmp_path).fit(model, loader())


@pytest.mark.parametrize("rule", RULES)
def test_networks_that_cannot_be_trained_are_refused(rule):
    generator, features = MLPGenerator(2, 3, (16,)), MLPFeatures(2, 4, (2,))
    features.layers[0] = nn.Linear(2, 2)
    shared = copy.deepcopy(generator)
    shared.layers.append(features.layers[0])
    critic = LearnedKernelCritic(features, 4)
    with pytest.raises(ValueError, match=r"share the parameters \['layers.3.weight"):
        gan(shared, critic, rule, latents=3)
    with pytest.raises(ValueError, match="the generator MLPGenerator has no parameter with"):
        gan(generator.requires_grad_(False), critic, rule, latents=3)


def test_a_gradient_that_is_not_finite_moves_nothing(tmp_path):
    class Cusp(nn.Module):
        """Finite in value, infinite in slope."""

        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return self.scale.sqrt() * x.sum(1)

    model = ascent(MLPGenerator(2, 3), Cusp(), latents=3, alpha=0.0, beta=0.0)
    with pytest.raises(RuntimeError, match="diverged: the gradient of the critic is not finite"):
        trainer(1, tmp_path).fit(model, loader())
    assert all(p.isfinite().all() for p in model.parameters())


def test_features_that_break_leave_the_generator_where_it_is(tmp_path):
    class Broken(MLPFeatures):
        def __init__(self):
            super().__init__(2, 16, (16,))
            self.scale = nn.Parameter(torch.zeros(()))

        def forward(self, x):
            return super().forward(x) + self.scale.sqrt() * x[:, :1]  # infinite slope in scale

    torch.manual_seed(0)
    model = closed_form(MLPGenerator(2, 3), LearnedKernelCritic(Broken(), 16), latents=3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(RuntimeError, match="diverged: the gradient of the critic is not finite"):
        trainer(1, tmp_path).fit(model, loader())
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_the_certificate_sees_one_dropout_mask(tmp_path):
    torch.manual_seed(0)
    features = nn.Sequential(nn.Linear(2, 16), nn.SiLU(), nn.Dropout(0.3), nn.Linear(16, 16))
    model = closed_form(
        nn.Sequential(MLPGenerator(2, 3, (16,)), nn.Dropout(0.2)),
        LearnedKernelCritic(features, 16),
        latents=3,
        eta=1e-3,
        beta=0.1,
    )
    logger = CSVLogger(tmp_path)
    trainer(2, tmp_path, logger=logger).fit(model, loader(16))
    with open(f"{logger.log_dir}/metrics.csv") as file:
        ratios = [float(row["certificate/ratio"]) for row in csv.DictReader(file)]
    assert all(0.95 < ratio < 1.05 for ratio in ratios)


class WithBackbone(MMDGAN):
    def __init__(self, backbone: nn.Module, width: int = 16):
        critic = LearnedKernelCritic(MLPFeatures(2, width, (16,)), width)
        super().__init__(backbone, critic, ClosedForm(beta=0.1), latents=3)


@pytest.mark.filterwarnings("ignore:Attribute 'backbone' is an instance of `nn.Module`")
def test_a_subclass_that_takes_networks_resumes(tmp_path):
    model = WithBackbone(MLPGenerator(2, 3, (16,)))
    fit = trainer(2, tmp_path)
    fit.fit(model, loader(16))
    fit.save_checkpoint(tmp_path / "a.ckpt")
    again = WithBackbone(MLPGenerator(2, 3, (16,)))
    trainer(3, tmp_path).fit(again, loader(16), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert again.critic_step == 3
    assert again.hparams["width"] == 16


def test_held_out_data_are_checked_too(tmp_path):
    model = make_model()
    held_out = DataLoader(torch.full((4, 2), torch.nan), batch_size=4)
    with pytest.raises(ValueError, match="holds NaN"):
        trainer(1, tmp_path).fit(model, loader(), held_out)
    other = DataLoader(torch.randn(4, 3), batch_size=4)
    with pytest.raises(ValueError, match=r"samples of shape \(3,\)"):
        trainer(1, tmp_path).validate(model, other, verbose=False)


def test_generator_metrics_are_logged_on_every_row(tmp_path):
    logger = CSVLogger(tmp_path)
    model = make_model(GradientAscent, critic_steps=5)
    trainer(2, tmp_path, logger=logger, log_every_n_steps=3).fit(model, loader())
    with open(f"{logger.log_dir}/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["generator/gradient_norm"] != "" for row in rows] == [False, True, True]


def test_a_trust_region_undoes_steps_that_are_too_long(tmp_path):
    """From a step forty times too long, each rise is undone and the descent goes on."""
    model = make_model(eta=20.0, trust_region=TrustRegion())
    seen = []

    class Watch(Callback):
        def on_train_batch_start(self, trainer, pl_module, *_):
            self.before = copy.deepcopy(pl_module.generator.state_dict())

        def on_train_batch_end(self, trainer, pl_module, *_):
            metrics, after = trainer.callback_metrics, pl_module.generator.state_dict()
            unmoved = all(torch.equal(after[name], p) for name, p in self.before.items())
            seen.append((float(metrics["certificate/realised"]), unmoved, pl_module.cumulative_lr))

    torch.manual_seed(1)
    real = ring(256)
    trainer(60, tmp_path, callbacks=[Watch()]).fit(model, DataLoader(real, batch_size=256))
    assert [unmoved for _, unmoved, _ in seen] == [realised > 0 for realised, *_ in seen]
    assert 1 <= sum(unmoved for _, unmoved, _ in seen) < 30
    for (_, _, before), (_, unmoved, after) in pairwise(seen):
        assert (after == pytest.approx(before, rel=1e-12)) is unmoved
    assert 0.05 < model.rule.trust_region.trust * 20.0 <= 0.5 * 1.2
    kernel = Gaussian(1.0)
    start = mmd2_unbiased(real, make_model().sample(512), kernel)
    assert mmd2_unbiased(real, model.sample(512), kernel) < 0.05 * start


def test_a_trust_region_resumes(tmp_path):
    data = loader(16)
    through, first, second = (make_model(eta=5.0, trust_region=TrustRegion()) for _ in range(3))
    trainer(6, tmp_path).fit(through, data)
    half = trainer(2, tmp_path)
    half.fit(first, data)
    half.save_checkpoint(tmp_path / "half.ckpt")
    trainer(6, tmp_path).fit(second, data, ckpt_path=tmp_path / "half.ckpt", weights_only=True)
    states = [vars(model.rule.trust_region) for model in (through, second)]
    assert states[0] == states[1] != vars(TrustRegion())
    for p, q in zip(through.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)


def test_a_trust_region_is_of_the_flow_alone(tmp_path):
    for kwargs in ({"generator_optimizer": torch.optim.Adam}, {"generator_clip_norm": 1.0}):
        model = make_model(trust_region=TrustRegion(), **kwargs)
        start = copy.deepcopy(model.state_dict())
        with pytest.raises(ValueError, match="trust_region adapts steps along the flow"):
            trainer(1, tmp_path).fit(model, loader())
        assert all(torch.equal(p, start[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize(
    ("flags", "message", "cure"),
    [
        ({"accumulate_grad_batches": 4}, r"MMDGAN\(micro_batches=4\)", {"micro_batches": 4}),
        (
            {"gradient_clip_val": 0.5},
            r"generator_clip_norm=0.5, critic_clip_norm=0.5\)",
            {"generator_clip_norm": 0.5, "critic_clip_norm": 0.5},
        ),
    ],
)
def test_flags_of_the_trainer_that_the_model_has_itself(flags, message, cure, tmp_path):
    data = DataLoader(torch.randn(16, 2), 8)

    def model(**kwargs):
        return MMDGAN(nn.Linear(3, 2), LearnedKernelCritic(nn.Linear(2, 4), 4), latents=3, **kwargs)

    with pytest.raises(ValueError, match=message):
        quiet_trainer(tmp_path, max_steps=2, **flags).fit(model(), data)
    quiet_trainer(tmp_path, max_steps=2).fit(model(**cure), data)


def test_each_of_several_validation_loaders_is_logged(tmp_path):
    model = MMDGAN(nn.Linear(3, 2), LearnedKernelCritic(nn.Linear(2, 4), 4), latents=3)
    near, far = (DataLoader(torch.randn(16, 2) + shift, 8) for shift in (0.0, 9.0))
    trainer = quiet_trainer(tmp_path, max_steps=2)
    trainer.fit(model, near, [near, far])
    logged = [trainer.callback_metrics[f"val/gap/dataloader_idx_{i}"] for i in range(2)]
    assert logged[0] != logged[1]
