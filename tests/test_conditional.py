"""Class-conditional networks, latents with labels, and what asks for a class."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import quiet_trainer
from torch import nn
from torch.utils.data import DataLoader

from lightning_mmd import (
    MMDGAN,
    ClassFeatures,
    ClassProductFeatures,
    ClosedForm,
    DeepKernel,
    DigitsFeatures,
    EmbeddingCritic,
    FeatureMetrics,
    Game,
    GradientAscent,
    LabelledLatents,
    LearnedKernelCritic,
    Player,
    SampleGrid,
    mmd2_features,
)
from lightning_mmd.cli import main
from lightning_mmd.commands.doctor import check_parity
from lightning_mmd.commands.evaluate import score_classes
from lightning_mmd.conditional import ClassGroupNorm
from lightning_mmd.data import DigitsDataModule
from lightning_mmd.kernel_objectives import deep_mmd2
from lightning_mmd.kernels import Linear
from lightning_mmd.networks import ConvFeatures, ConvGenerator, MLPFeatures

SHAPE = (1, 8, 8)


def test_class_group_norm_is_group_norm_with_the_row_of_the_class():
    norm = ClassGroupNorm(2, 4, 3)
    nn.init.normal_(norm.gain), nn.init.normal_(norm.shift)
    x, labels = torch.randn(5, 4, 3, 2), torch.tensor([2, 0, 1, 1, 2])
    for i, label in enumerate(labels):
        plain = nn.GroupNorm(2, 4)
        plain.weight.data, plain.bias.data = norm.gain[label].data, norm.shift[label].data
        torch.testing.assert_close(norm(x, labels)[i], plain(x[i : i + 1])[0])


def test_class_features_make_the_projection_critic():
    h = MLPFeatures(2, 6)
    critic = LearnedKernelCritic(ClassFeatures(h, 6, 4), 6)
    x, y = torch.randn(7, 2), torch.randint(4, (7,))
    w, v = critic.weights, critic.weights * critic.features.scale
    torch.testing.assert_close(critic(x, y), h(x) @ w + (h(x) * v[y]).sum(1))


def test_fixed_vectors_of_classes_have_the_kernel_one_plus_same_class_on_average():
    """Over many draws of e: (1 + 1[y = y']) <h(x), h(x')>, up to four standard errors."""
    h = MLPFeatures(2, 6)
    x, y = torch.randn(4, 2), torch.tensor([0, 1, 1, 0])
    grams = []
    for _ in range(4000):
        phi = ClassFeatures(h, 6, 2)(x, y).detach()
        grams.append(phi @ phi.T)
    grams = torch.stack(grams)
    expected = (h(x) @ h(x).T).detach() * (1 + (y[:, None] == y).double())
    error = grams.std(0) / len(grams) ** 0.5
    assert ((grams.mean(0) - expected).abs() < 4 * error).all()
    fixed, learned = ClassFeatures(h, 6, 2), ClassFeatures(h, 6, 2, learned=True)
    assert "scale" in fixed.state_dict()
    assert "scale" not in dict(fixed.named_parameters())
    assert "scale" in dict(learned.named_parameters())


def test_product_features_have_the_product_kernel():
    h, frequencies = MLPFeatures(2, 6), [0.5, 0.3, 0.2]
    features = ClassProductFeatures(h, 6, 3, frequencies)
    x, y = torch.randn(9, 2), torch.randint(3, (9,))
    phi = features(x, y)
    same = (y[:, None] == y).double()
    expected = (h(x) @ h(x).T) * same / (0.5**2 + 0.3**2 + 0.2**2)
    torch.testing.assert_close(phi @ phi.T, expected)
    assert features.matches == pytest.approx(0.38)


def test_the_unbiased_mmd2_has_mean_zero_where_both_laws_agree():
    """Over all samples of two and two from one law of three labelled points, exactly."""
    points = torch.randn(3, 2)
    labels = torch.tensor([0, 1, 1])
    p = torch.tensor([0.5, 0.2, 0.3])
    features = ClassProductFeatures(MLPFeatures(2, 6), 6, 2, [0.5, 0.5])
    phi = features(points, labels).detach()
    mean = biased = 0.0
    for draw in itertools.product(range(3), repeat=4):
        chance = p[list(draw)].prod()
        real, fake = phi[list(draw[:2])], phi[list(draw[2:])]
        mean += chance * deep_mmd2(Linear(), real, fake)
        biased += chance * mmd2_features(real, fake)
    assert abs(mean) < 1e-12 < 1e-3 < biased
    # and it is not zero where only the labels differ
    other = features(points, 1 - labels).detach()
    assert (p @ (phi - other)).square().sum() > 1e-3


def test_paired_the_unbiased_mmd2_has_mean_zero_given_the_labels():
    """Over all samples of three and three with the labels 0, 1, 1, exactly; with the pairs not."""
    points = torch.randn(4, 2)
    labels = torch.tensor([0, 0, 1, 1])  # of the points
    features = ClassProductFeatures(MLPFeatures(2, 6), 6, 2)
    phi = features(points, labels).detach()
    p = {0: (0.3, 0.7), 1: (0.6, 0.4)}  # of the two points of a class
    batch = [0, 1, 1]
    mean = with_pairs = 0.0
    for draw in itertools.product(range(2), repeat=6):
        chance = math.prod(p[c][k] for c, k in zip(batch * 2, draw, strict=True))
        index = [2 * c + k for c, k in zip(batch * 2, draw, strict=True)]
        real, fake = phi[index[:3]], phi[index[3:]]
        mean += chance * deep_mmd2(Linear(), real, fake, paired=True)
        with_pairs += chance * deep_mmd2(Linear(), real, fake)
    assert abs(mean) < 1e-12 < 1e-2 < -with_pairs


@pytest.mark.parametrize("paired", [True, False])
def test_a_training_asks_for_the_classes_of_its_batch(paired):
    labels = torch.arange(64) % 10
    torch.manual_seed(3)
    z, drawn = LabelledLatents(3, 10)(64)
    torch.manual_seed(3)
    game = Game(None, None, (torch.zeros(64, 2), labels), LabelledLatents(3, 10, paired=paired))
    same, asked = game.latents()
    assert torch.equal(same, z)
    assert torch.equal(asked, labels if paired else drawn)
    assert not torch.equal(drawn, labels)
    assert game.paired is paired


def test_offsets_of_classes_are_not_seen_by_a_paired_critic(as_trained):
    """A critic's gap does not change with an offset for each class; apart it does."""
    offsets = torch.tensor([5.0, -3.0, 1.0, 0.5])

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.slope = nn.Parameter(torch.ones(2))
            self.offset = nn.Parameter(offsets.clone())

        def forward(self, x, labels):
            return x @ self.slope + self.offset[labels]

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(4, 2))

        def forward(self, z, labels):
            return z + self.shift[labels]

    for paired in (True, False):
        torch.manual_seed(0)
        generator, critic = Own(), Critic()
        players = [
            Player(name, net, dict(net.named_parameters()), torch.optim.SGD(net.parameters(), 0.1))
            for name, net in (("generator", generator), ("critic", critic))
        ]
        real = torch.randn(32, 2), torch.randint(4, (32,))
        rule = GradientAscent(alpha=0.0, beta=0.0)
        rule.update(Game(*players, real, LabelledLatents(2, 4, paired=paired)))
        assert torch.allclose(critic.offset.detach(), offsets, atol=1e-6) is paired


def test_latents_draw_classes_with_their_frequencies():
    torch.manual_seed(0)
    z, y = LabelledLatents(3, 3, [2, 0, 6])(4000)
    assert z.shape == (4000, 3)
    assert y.dtype == torch.int64
    counts = y.bincount(minlength=3)
    assert counts[1] == 0
    assert abs(counts[0] / 4000 - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    _, y = LabelledLatents(3, 4)(4000)
    assert (y.bincount() / 4000 - 0.25).abs().max() < 4 * (0.25 * 0.75 / 4000) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((3, 1), "num_classes of at least 2, got 1"),
        ((3, 2, [1.0]), "needs 2 frequencies"),
        ((3, 2, [1.0, -1.0]), "needs 2 frequencies"),
        ((3, 2, [0.0, 0.0]), "not all of them 0"),
        ((3, 2, [1.0, float("inf")]), "finite frequencies"),
    ],
)
def test_latents_refuse_what_is_no_law(arguments, message):
    with pytest.raises(ValueError, match=message):
        LabelledLatents(*arguments)


@pytest.fixture
def as_trained():
    """Networks as a training has them: digits are float32."""
    torch.set_default_dtype(torch.float32)


def make(rule, num_classes=10, product=False):
    torch.manual_seed(0)
    generator = ConvGenerator(SHAPE, 8, (16, 8), num_classes=num_classes)
    net = ConvFeatures(SHAPE, 16, (8, 16), activated=True)
    if product:
        features, width = ClassProductFeatures(net, 16, num_classes), 16 * num_classes
    else:
        features, width = ClassFeatures(net, 16, num_classes), 16
    deep = isinstance(rule, DeepKernel)
    critic = EmbeddingCritic(features, width, 8) if deep else LearnedKernelCritic(features, width)
    return MMDGAN(generator, critic, rule, latents=LabelledLatents(8, num_classes))


RULES = {
    "closed form": ClosedForm(beta=0.05, max_iterations=4),
    "gradient ascent": GradientAscent(alpha=1.0, beta=0.1),
    "default": None,
    "deep kernel": DeepKernel(),
}


@pytest.mark.parametrize("product", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_every_rule_trains_on_labelled_digits_and_resumes(name, product, tmp_path, as_trained):
    data = lambda: DigitsDataModule(batch_size=32, labels=True)  # noqa: E731
    grid = SampleGrid(every_n_steps=2, num_samples=20, num_columns=2, dirpath=tmp_path)

    def fit(model, steps, path=None):
        trainer = quiet_trainer(tmp_path, max_steps=steps, callbacks=[grid])
        trainer.fit(model, data(), ckpt_path=path, weights_only=True)
        return trainer

    whole = make(RULES[name], product=product)
    fit(whole, 4)
    first = make(RULES[name], product=product)
    fit(first, 2).save_checkpoint(tmp_path / "half.ckpt")
    second = make(RULES[name], product=product)
    fit(second, 4, tmp_path / "half.ckpt")
    for p, q in zip(whole.parameters(), second.parameters(), strict=True):
        assert torch.equal(p, q)
    assert any((p != q).any() for p, q in zip(first.parameters(), whole.parameters(), strict=True))


@pytest.mark.parametrize("name", RULES)
def test_two_processes_equal_one(name):
    assert max(row.error for row in check_parity(make(RULES[name], num_classes=2))) < 1e-10


def test_a_class_can_be_asked_for():
    model = make(None)
    z, _ = model.fixed_latents(6)
    asked = torch.tensor([3, 1, 4, 1, 5, 9])
    expected = model.generator(z, asked)
    assert torch.equal(model.sample(6, (z, asked * 0), labels=asked), expected)
    assert torch.equal(model.sample(6, (z, asked * 0), labels=asked.tolist()), expected)
    assert torch.equal(model.sample(6, (z, asked), labels=7), model.generator(z, asked * 0 + 7))
    for labels, message in [
        (10, "0 to 9, got 10 to 10"),
        ([1, 2], "one class or 6"),
        (0.5, "whole numbers"),
    ]:
        with pytest.raises(ValueError, match=message):
            model.sample(6, labels=labels)
    plain = MMDGAN(nn.Linear(3, 2), LearnedKernelCritic(nn.Linear(2, 4), 4), latents=3)
    with pytest.raises(ValueError, match="takes none"):
        plain.sample(6, labels=1)


def test_a_picture_has_a_row_for_each_class(tmp_path, as_trained):
    model = make(None, num_classes=3)
    seen = []
    model.generator.register_forward_hook(lambda module, inputs, output: seen.append(inputs[1]))
    data = DigitsDataModule(batch_size=32, labels=True)
    grid = SampleGrid(num_samples=8, num_columns=2, dirpath=tmp_path)
    trainer = quiet_trainer(tmp_path, max_steps=1, callbacks=[grid])
    data.setup()
    pairs = zip(data._split(0).data, data._split(0).labels, strict=True)
    three = [(x, y) for x, y in pairs if y < 3]
    trainer.fit(model, DataLoader(three, batch_size=32))
    assert any(y.tolist() == [0, 0, 1, 1, 2, 2, 0, 0] for y in seen)


def test_labels_that_do_not_suit_are_refused_before_the_first_step(tmp_path):
    model = make(None)
    with pytest.raises(ValueError, match=r"serve no labels. Set labels=True"):
        quiet_trainer(tmp_path, max_steps=1).fit(model, DigitsDataModule(batch_size=32))
    with pytest.raises(ValueError, match="draw 4 classes, but the data have 10"):
        quiet_trainer(tmp_path, max_steps=1).fit(
            make(None, num_classes=4), DigitsDataModule(batch_size=32, labels=True)
        )


def test_each_class_is_scored_alone(as_trained):
    """Digits as if they were generated, threes for eights and eights for threes."""
    features = DigitsFeatures()
    data = DigitsDataModule(labels=True)
    data.setup()
    train, _, test = data._splits
    real = test.data, test.labels
    others = train.data, train.labels
    swap = torch.tensor([0, 1, 2, 8, 4, 5, 6, 7, 3, 9])  # threes for eights
    asked = swap[real[1]]
    found = score_classes(real, (real[0], asked), others, features, 100, 0)
    right = features.classify(real[0]) == real[1]
    assert found["classes"][5]["asked_for"] == right[real[1] == 5].double().mean()
    assert found["asked_for"] == (features.classify(real[0]) == asked).double().mean()
    metric = FeatureMetrics(features, neighbours=None, seed=0)
    metric.update(real[0][real[1] == 8], real=True)
    metric.update(real[0][asked == 8], real=False)
    assert found["classes"][8]["kid"] == pytest.approx(float(metric.compute()["kid"]))
    assert found["classes"][8]["kid"] > 5 * abs(found["classes"][5]["kid"])
    assert abs(found["classes"][5]["floor"]) < found["classes"][8]["kid"]


def test_evaluate_and_sample_by_class(as_trained, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = ["--model.latents=LabelledLatents", "--model.latents.dim=8"]
    model += ["--model.latents.num_classes=10"]
    critic = {
        "class_path": "LearnedKernelCritic",
        "init_args": {
            "num_features": 16,
            "features": {
                "class_path": "ClassFeatures",
                "init_args": {
                    "num_features": 16,
                    "num_classes": 10,
                    "features": {
                        "class_path": "ConvFeatures",
                        "init_args": {"sample_shape": SHAPE, "num_features": 16},
                    },
                },
            },
        },
    }
    generator = {
        "class_path": "ConvGenerator",
        "init_args": {"sample_shape": SHAPE, "latent_dim": 8, "num_classes": 10},
    }
    main(
        [
            *("fit", "--seed_everything=0", *model, f"--model.critic={json.dumps(critic)}"),
            *(f"--model.generator={json.dumps(generator)}", "--data=DigitsDataModule"),
            *("--data.labels=true", "--data.batch_size=32", "--trainer.max_steps=2"),
            *("--trainer.logger=false", "--trainer.enable_progress_bar=false"),
            "--trainer.limit_val_batches=0",
            '--trainer.callbacks=[{"class_path": "ModelCheckpoint", "init_args": '
            '{"dirpath": "saved", "save_last": true, "every_n_train_steps": 2}}]',
        ]
    )
    judged = ["--data=DigitsDataModule", "--features=DigitsFeatures", "--num=300"]
    common = ["evaluate", "--ckpt_path=saved/last.ckpt", *judged, "--per_class=true"]
    main([*common, "--data.labels=true", "--output=scores.json"])
    report = json.loads((tmp_path / "scores.json").read_text())
    assert set(report["classes"]) == set("0123456789")
    assert 0 <= report["asked_for"] < 0.5  # two updates draw no digits
    assert "of the class asked for" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(common)
    assert "Add --data.labels true" in capsys.readouterr().err

    main(
        [
            "sample",
            "--ckpt_path=saved/last.ckpt",
            "--labels=3,7",
            "--num=4",
            "--num_columns=1",
            "--scale=1",
        ]
    )
    model = MMDGAN.load_from_checkpoint("saved/last.ckpt")
    z, _ = model.fixed_latents(4)
    expected = SampleGrid(num_columns=1).draw(model.sample(4, z, labels=[3, 7, 3, 7]))
    picture = torch.tensor(np.asarray(Image.open("samples.png").convert("RGB")))
    assert torch.equal(picture, expected.permute(1, 2, 0))
    with pytest.raises(SystemExit):
        main(["sample", "--ckpt_path=saved/last.ckpt", "--labels=a"])
    assert "whole numbers with commas between" in capsys.readouterr().err
