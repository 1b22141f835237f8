"""One contract for all update rules, ours and toys that are written in one file each."""

import copy
import sys
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import quiet_trainer
from torch import nn
from torch.optim import SGD
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    BandwidthSchedule,
    BatchParts,
    ClosedForm,
    ConstantNoise,
    ConvergenceMonitor,
    DeepKernel,
    EmbeddingCritic,
    FeatureMatching,
    Game,
    Gaussian,
    GeneratorEMA,
    GradientAscent,
    Hinge,
    InstanceNoise,
    LearnedKernelCritic,
    Logistic,
    MMDTracker,
    NoiseInjection,
    ParametricGradientPenalty,
    Player,
    RandomFourierFeatures,
    RelativeTestLR,
    SampleGrid,
    SlopePenalty,
    TrustRegion,
    solve_witness,
)
from lightning_mmd.cli import main
from lightning_mmd.commands.doctor import check_parity
from lightning_mmd.networks import MLPFeatures, MLPGenerator

sys.path.append(str(Path(__file__).parent / "toys"))
from toy_estimator import Thirds
from toy_kernel import Cauchy
from toy_rule import MeanMatching
from toy_system import Ridge

RULES = {
    "closed form": ClosedForm(beta=0.1),
    "trust region": ClosedForm(beta=0.1, trust_region=TrustRegion()),
    "gradient ascent": GradientAscent(alpha=2.0, beta=0.1),
    "hinge": GradientAscent(alpha=0.5, beta=0.1, objective=Hinge()),
    "logistic, R1": GradientAscent(
        alpha=0.0, beta=0.0, objective=Logistic(), slope=SlopePenalty(0.5, at="real")
    ),
    "logistic, all": GradientAscent(
        alpha=0.5, beta=0.1, objective=Logistic(), slope=SlopePenalty(0.3, interval=2)
    ),
    "logistic, matching": GradientAscent(
        alpha=0.5, beta=0.1, objective=Logistic(), fraction=0.5, matching=FeatureMatching(2.0)
    ),
    "deep kernel": DeepKernel(),
    "deep kernel, slope": DeepKernel(slope=SlopePenalty(0.3, interval=2), alpha=0.1),
    "toy rule": MeanMatching(weight=0.5),
    "toy system": ClosedForm(beta=0.1, system=Ridge(power=0.5)),
    "toy kernel": DeepKernel(kernel=Cauchy(2.0)),
    "toy estimator": GradientAscent(alpha=2.0, beta=0.1, estimator=Thirds(0.9)),
}
BATCH = 12


def embeds(rule):
    return isinstance(rule, DeepKernel)


def make_model(rule, kind=MMDGAN, labelled=False, **kwargs):
    torch.manual_seed(0)
    generator, features = MLPGenerator(2, 3, (16,)), MLPFeatures(2, 8, (16,))
    if labelled:
        generator, features = Labelled(generator, 3), Labelled(features, 2)
    critic = EmbeddingCritic(features, 8, 4) if embeds(rule) else LearnedKernelCritic(features, 8)
    return kind(generator, critic, rule, **({"latents": 3} | kwargs))


def data(num=BATCH):
    return torch.randn(num, 2, generator=torch.Generator().manual_seed(1)) + 1.0


def fit(model, path, num_steps, callbacks=(), ckpt_path=None, batches=None, **kwargs):
    callbacks = list(callbacks)
    trainer = quiet_trainer(path, max_steps=num_steps, callbacks=callbacks, **kwargs)
    loader = DataLoader(data(), batch_size=BATCH) if batches is None else batches
    trainer.fit(model, loader, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def assert_equal_parameters(one, other):
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q), name


# torch itself reads the .grad of tensors that it looks at while it compiles
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
all_rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@all_rules
def test_steps_are_counted_in_generator_updates(rule, tmp_path):
    counts = [0, 0]

    class Count(Callback):
        def on_fit_start(self, trainer, pl_module):
            for i, optimizer in enumerate(trainer.optimizers):
                optimizer.register_step_post_hook(lambda *_, i=i: self.count(i))

        def count(self, i):
            counts[i] += 1

    model = make_model(rule, critic_steps=3)
    checkpoints = ModelCheckpoint(tmp_path, every_n_train_steps=2, save_top_k=-1)
    trainer = fit(model, tmp_path, 4, [Count(), checkpoints], enable_checkpointing=True)
    assert counts == [4, 12]
    assert (trainer.global_step, model.critic_step, model.images_seen) == (4, 12, 12 * BATCH)
    assert len(list(tmp_path.glob("*.ckpt"))) == 2
    assert {"critic/gap", "generator/gradient_norm"} <= trainer.callback_metrics.keys()


@all_rules
def test_both_networks_move(rule, tmp_path):
    model = make_model(rule)
    start = copy.deepcopy(model)
    fit(model, tmp_path, 3)
    for (name, p), q in zip(model.named_parameters(), start.parameters(), strict=True):
        # A witness of differences of means does not see a constant in the features.
        if name != "critic.features.layers.2.bias":
            assert not torch.equal(p, q), name


@all_rules
@pytest.mark.parametrize("num_parts", [2, 5])
def test_micro_batches_train_as_the_batch(rule, num_parts, tmp_path):
    if isinstance(rule, MeanMatching):
        pytest.skip("a toy that takes the whole batch")
    sgd = {"critic_optimizer": lambda p: SGD(p, lr=0.05)}
    whole, parts = make_model(rule, **sgd), make_model(rule, micro_batches=num_parts, **sgd)
    fit(whole, tmp_path, 3)
    fit(parts, tmp_path, 3)
    for (name, p), q in zip(whole.named_parameters(), parts.parameters(), strict=True):
        assert (p - q).abs().max() < 1e-11, name


@all_rules
def test_two_processes_train_as_one(rule):
    if "Thirds" in repr(rule):
        pytest.skip("the check shares halves of a batch out: thirds of it are not those of shares")
    assert max(row.error for row in check_parity(make_model(rule))) < 1e-10


@all_rules
@pytest.mark.parametrize("critic_steps", [1, 2])
def test_resume_goes_on_bit_for_bit(rule, critic_steps, tmp_path):
    """Six updates against two, a checkpoint and four more; with an average, noise and schedules."""

    def parts():
        noise = [] if isinstance(rule, MeanMatching) else [NoiseInjection(ConstantNoise(0.3))]
        return [GeneratorEMA(half_life=3.0), *noise]

    kwargs = {"critic_steps": critic_steps}
    if rule.adapts_steps is None:
        kwargs["generator_scheduler"] = lambda o: torch.optim.lr_scheduler.StepLR(o, 2, 0.5)
    through, first, second = (make_model(rule, **kwargs) for _ in range(3))
    fit(through, tmp_path, 6, parts())
    trainer = fit(first, tmp_path, 2, parts())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    for p in second.parameters():
        nn.init.constant_(p, 7.0)
    fit(second, tmp_path, 6, parts(), tmp_path / "half.ckpt")
    assert_equal_parameters(through, second)
    assert through.rule.state_dict().keys() == second.rule.state_dict().keys()
    latents = through.fixed_latents(5)
    assert torch.equal(through.sample(5, latents), second.sample(5, latents))
    assert not torch.equal(through.sample(5, latents), through.generator(latents))  # the average


@all_rules
def test_a_rule_is_not_shared_by_models(rule, tmp_path):
    one = make_model(rule)
    before = repr(rule), rule.state_dict()
    fit(one, tmp_path, 2)
    assert one.rule is not rule
    assert repr(before) == repr((repr(rule), rule.state_dict()))


@all_rules
def test_compiled_networks_train_alike(rule, tmp_path):
    plain, compiled = make_model(rule), make_model(rule)
    compiled.generator.compile(backend="eager")
    compiled.critic.compile(backend="eager")
    for model in (plain, compiled):
        fit(model, tmp_path, 2)
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-11, msg=name)


@all_rules
def test_bf16_mixed_trains(rule, tmp_path):
    torch.set_default_dtype(torch.float32)
    model = make_model(rule)
    start = copy.deepcopy(model)
    trainer = fit(model, tmp_path, 3, precision="bf16-mixed")
    assert all(p.isfinite().all() and p.dtype == torch.float32 for p in model.parameters())
    moved = [not torch.equal(p, q) for p, q in zip(model.parameters(), start.parameters())]  # noqa: B905
    assert sum(moved) >= len(moved) - 1
    assert trainer.callback_metrics["critic/gap"].isfinite()


@all_rules
def test_every_callback_works_or_is_refused_by_name(rule, tmp_path):
    """Observers change nothing; noise changes the generator; what does not fit says so."""
    plain = make_model(rule)
    fit(plain, tmp_path, 4)
    watched = make_model(rule)
    monitor = ConvergenceMonitor(every_n_steps=1, num_samples=10)
    observers = [
        MMDTracker(Gaussian(1.0), num_real=10, num_fake=10, every_n_steps=2),
        SampleGrid(every_n_steps=2, num_samples=10),
        monitor,
        RelativeTestLR(Gaussian(1.0), every_n_steps=2, num_samples=10, lookback=5),
    ]
    loaders = {"batches": DataLoader(data(), batch_size=BATCH)}
    trainer = quiet_trainer(tmp_path, max_steps=4, callbacks=observers)
    trainer.fit(watched, loaders["batches"], DataLoader(data(20), batch_size=20))
    assert_equal_parameters(plain, watched)
    assert all(scale > 0 for scale in monitor.traces.critic_scale)
    with pytest.raises(ValueError, match="MMDGAN has the parametric-gradient penalty itself"):
        fit(make_model(rule), tmp_path, 1, [ParametricGradientPenalty(1.0)])
    if isinstance(rule, MeanMatching):
        return
    noisy = make_model(rule)
    fit(noisy, tmp_path, 4, [NoiseInjection(ConstantNoise(0.5))])
    assert not torch.equal(noisy.generator.layers[0].weight, plain.generator.layers[0].weight)
    everywhere = make_model(rule)
    if rule.needs_equal_calls(1) is None:
        fit(everywhere, tmp_path, 4, [InstanceNoise(ConstantNoise(0.5))])
        assert not torch.equal(
            everywhere.critic.features.layers[0].bias, plain.critic.features.layers[0].bias
        )
    else:
        with pytest.raises(ValueError, match="changes each call of the critic, but ClosedForm"):
            fit(everywhere, tmp_path, 1, [InstanceNoise(ConstantNoise(0.5))])


def test_the_bandwidth_of_a_deep_kernel_follows_a_schedule(tmp_path):
    model = make_model(DeepKernel(kernel=Gaussian(1.5)))
    schedule = BandwidthSchedule(initial=4.0, num_steps=4, target="rule.kernel")
    widths = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            widths.append(pl_module.rule.kernel.bandwidth)

    fit(model, tmp_path, 5, [schedule, Watch()])
    assert widths == pytest.approx([6.0, 6.0 / 2**0.5, 3.0, 3.0 / 2**0.5, 1.5])
    with pytest.raises(ValueError, match="needs RandomFourierFeatures or a Kernel in 'critic'"):
        fit(model, tmp_path, 1, [BandwidthSchedule(4.0)])


def test_names_that_two_rules_share_mean_one_thing(tmp_path, monkeypatch, capsys):
    """A rule that is named on the command line starts afresh, so defaults may differ."""
    (tmp_path / "a.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {
                    "rule": {"class_path": "ClosedForm", "init_args": {"alpha": 3.0, "eta": 0.2}},
                    "generator": {"class_path": "MLPGenerator"},
                    "critic": {
                        "class_path": "EmbeddingCritic",
                        "init_args": {
                            "features": {"class_path": "MLPFeatures"},
                            "num_features": 64,
                        },
                    },
                },
                "data": {"class_path": "GaussianMixtureDataModule"},
            }
        )
    )

    def printed(*arguments):
        with pytest.raises(SystemExit):
            main(["fit", "--config", str(tmp_path / "a.yaml"), *arguments, "--print_config"])
        rule = yaml.safe_load(capsys.readouterr().out)["model"]["rule"]
        return rule["class_path"].split(".")[-1], rule["init_args"]

    (tmp_path / "b.yaml").write_text(
        yaml.safe_dump({"model": {"rule": {"class_path": "DeepKernel"}}})
    )
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "b.yaml"), "--print_config"])
    rule = yaml.safe_load(capsys.readouterr().out)["model"]["rule"]
    assert rule["init_args"]["alpha"] == 0.0  # no default rule has lent its own
    name, kept = printed("--model.rule.beta=0.5")
    assert (name, kept["alpha"], kept["beta"], kept["eta"]) == ("ClosedForm", 3.0, 0.5, 0.2)
    name, fresh = printed("--model.rule=DeepKernel")
    assert (name, fresh["alpha"]) == ("DeepKernel", 0.0)
    name, fresh = printed("--model.rule=GradientAscent", "--model.rule.beta=0.3")
    assert (name, fresh["alpha"], fresh["beta"]) == ("GradientAscent", 1.0, 0.3)
    name, fresh = printed(
        "--model.rule=GradientAscent",
        "--model.rule.estimator=Split",
        "--model.rule.estimator.share=.3",
    )
    assert fresh["estimator"]["init_args"]["share"] == 0.3


def test_a_checkpoint_of_another_rule_is_refused(tmp_path):
    trainer = fit(make_model(RULES["gradient ascent"]), tmp_path, 1)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(ValueError, match=r"trained by GradientAscent\(.*this model has ClosedForm"):
        fit(make_model(ClosedForm()), tmp_path, 2, ckpt_path=tmp_path / "a.ckpt")
    with pytest.warns(UserWarning, match=r"alpha=2.0.*goes on with .*alpha=5.0"):
        fit(
            make_model(GradientAscent(alpha=5.0, beta=0.1)),
            tmp_path,
            2,
            ckpt_path=tmp_path / "a.ckpt",
        )


def test_the_toy_system_is_solved_exactly():
    """A w = delta with the ridge, against a dense solve."""
    model = make_model(ClosedForm(beta=0.2, system=Ridge(), max_iterations=50, tolerance=1e-12))
    generator, critic, real = model.generator, model.critic, data()
    still = [
        Player(name, net, parameters, SGD(parameters.values(), lr=0.0))
        for name, net, parameters in (
            ("generator", generator, dict(generator.named_parameters())),
            ("critic", critic, model.rule.critic_parameters(critic)),
        )
    ]
    z = torch.randn(BATCH, 3)
    model.rule.update(Game(*still, real, lambda n: z))

    def embedding(theta):
        return critic.embed(torch.func.functional_call(generator, theta, (z,))).mean(0)

    theta = {n: p.detach() for n, p in generator.named_parameters()}
    blocks = torch.func.jacrev(embedding)(theta)
    jacobian = torch.cat([block.reshape(8, -1) for block in blocks.values()], 1).detach()
    delta = (critic.embed(real).mean(0) - embedding(theta)).detach()
    matrix = jacobian @ jacobian.T + 0.2 * torch.diag(torch.arange(1.0, 9.0) / 8)
    expected = torch.linalg.solve(matrix, delta)
    torch.testing.assert_close(critic.weights.data, expected, rtol=1e-8, atol=1e-9)
    plain = solve_witness(critic.feature_map, generator, z, delta, beta=0.2)
    assert (plain.weights - expected).norm() > 0.01 * expected.norm()


@pytest.mark.parametrize("toy", ["toy rule", "toy system", "toy kernel", "toy estimator"])
def test_toys_run_from_a_configuration(toy, tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    rules = {
        "toy rule": {"class_path": "toy_rule.MeanMatching", "init_args": {"weight": 0.25}},
        "toy system": {
            "class_path": "ClosedForm",
            "init_args": {
                "system": {"class_path": "toy_system.Ridge", "init_args": {"power": 0.5}}
            },
        },
        "toy kernel": {
            "class_path": "DeepKernel",
            "init_args": {"kernel": {"class_path": "toy_kernel.Cauchy"}},
        },
        "toy estimator": {
            "class_path": "GradientAscent",
            "init_args": {"estimator": {"class_path": "toy_estimator.Thirds"}},
        },
    }
    critic = "EmbeddingCritic" if toy == "toy kernel" else "LearnedKernelCritic"
    features = {"class_path": "MLPFeatures", "init_args": {"num_features": 8}}
    config = {
        "seed_everything": 0,
        "trainer": {"max_steps": 3, "logger": False, "accelerator": "cpu"},
        "model": {
            "latents": 8,
            "rule": rules[toy],
            "generator": {"class_path": "MLPGenerator"},
            "critic": {
                "class_path": critic,
                "init_args": {"features": features, "num_features": 8},
            },
        },
        "data": {"class_path": "GaussianMixtureDataModule", "init_args": {"batch_size": 30}},
    }
    config["trainer"] |= {"enable_progress_bar": False, "enable_model_summary": False}
    (tmp_path / "a.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config", "a.yaml"])
    (path,) = tmp_path.glob("**/last.ckpt")
    loaded = MMDGAN.load_from_checkpoint(path)
    assert (
        toy.split()[1][:4] in repr(loaded.rule).lower()
        or "Mean" in repr(loaded.rule)
        or (any(name in repr(loaded.rule) for name in ("Ridge", "Cauchy", "Thirds")))
    )
    assert loaded.critic_step == 3
    assert loaded.sample(4).shape == (4, 2)


# Labels


class Labelled(nn.Module):
    """Adds a learned vector of the class to a network's input."""

    def __init__(self, network, dim):
        super().__init__()
        self.network = network
        self.shift = nn.Embedding(2, dim)
        nn.init.normal_(self.shift.weight, std=2.0)

    def forward(self, x, label):
        return self.network(x + self.shift(label))


def labelled_latents(num):
    return torch.randn(num, 3), torch.arange(num) % 2


class TwoClasses(torch.utils.data.Dataset):
    """Class 0 about (-2, 0), class 1 about (2, 0)."""

    def __init__(self, as_dict=False):
        self.x, self.y = data(96) * 0.3, torch.arange(96) % 2
        self.x[:, 0] += 4.0 * self.y - 2.0
        self.as_dict = as_dict

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        if self.as_dict:
            return {"points": self.x[i], "kind": self.y[i]}
        return self.x[i], self.y[i]


LABEL_RULES = {
    "closed form": (ClosedForm(beta=0.05, max_iterations=8), {}),
    "gradient ascent": (GradientAscent(alpha=1.0, beta=0.1), {}),
    "deep kernel": (DeepKernel(), {}),
}


@pytest.mark.parametrize("as_dict", [False, True])
@pytest.mark.parametrize("name", LABEL_RULES)
def test_two_classes_are_learned_through_the_labels(name, as_dict, tmp_path):
    """Both networks see the label; samples of a class come to lie where its data are."""
    rule, _ = LABEL_RULES[name]
    adam = lambda p: torch.optim.Adam(p, lr=1e-2, betas=(0.0, 0.9))  # noqa: E731
    optimizers = {"critic_optimizer": adam}
    if not isinstance(rule, ClosedForm):
        optimizers["generator_optimizer"] = adam
    parts = {"batch": BatchParts("points", "kind")} if as_dict else {}
    model = make_model(rule, labelled=True, latents=labelled_latents, **optimizers, **parts)
    loader = DataLoader(TwoClasses(as_dict), batch_size=96)
    fit(model, tmp_path, 2 if as_dict else 150, batches=loader)
    if as_dict:
        return
    z, y = model.fixed_latents(200)
    x = model.sample(200, (z, y))[:, 0]
    assert x[y == 0].mean() < -1.0 < 1.0 < x[y == 1].mean()


@pytest.mark.parametrize("name", LABEL_RULES)
def test_labels_are_ignored_where_the_latents_carry_none(name, tmp_path):
    rule, _ = LABEL_RULES[name]
    with_labels, without = make_model(rule), make_model(rule)
    x = TwoClasses().x
    fit(with_labels, tmp_path, 2, batches=DataLoader(TwoClasses(), batch_size=96))
    fit(without, tmp_path, 2, batches=DataLoader(x, batch_size=96))
    assert_equal_parameters(with_labels, without)


@pytest.mark.parametrize("name", LABEL_RULES)
def test_labels_that_are_missing_are_named(name, tmp_path):
    model = make_model(LABEL_RULES[name][0], labelled=True, latents=labelled_latents)
    with pytest.raises(ValueError, match=r"carry 1 label tensor\(s\), but a batch has 0"):
        fit(model, tmp_path, 1)


def test_a_dictionary_without_the_key_is_named(tmp_path):
    model = make_model(ClosedForm())
    loader = DataLoader(TwoClasses(as_dict=True), batch_size=8)
    with pytest.raises(TypeError, match=r"keys \['kind', 'points'\].*BatchParts\(samples"):
        fit(model, tmp_path, 1, batches=loader)


@pytest.mark.parametrize("name", LABEL_RULES)
@pytest.mark.parametrize("micro_batches", [1, 4])
def test_labels_follow_their_samples_into_parts_and_processes(name, micro_batches):
    model = make_model(
        LABEL_RULES[name][0], labelled=True, latents=labelled_latents, micro_batches=micro_batches
    )
    assert max(row.error for row in check_parity(model)) < 1e-10


def test_random_features_take_labels_of_their_features():
    features = RandomFourierFeatures(Gaussian(1.0), 8, 16)
    critic = LearnedKernelCritic(Labelled(MLPFeatures(2, 8), 2), 8, features)
    x, y = torch.randn(5, 2), torch.tensor([0, 1, 0, 1, 1])
    torch.testing.assert_close(critic(x, y), critic.feature_map(x, y) @ critic.weights)
    assert not torch.allclose(critic(x, y), critic(x, 1 - y))
