"""Numbers that go wrong are found before anything moves; a good state is kept and returned to."""

import copy
import math
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny import ascent, closed_form, quiet_trainer
from torch.utils.data import DataLoader

from lightning_mmd import DivergedError, GeneratorEMA, LearnedKernelCritic, OnDivergence
from lightning_mmd.checkpoints import read_checkpoint
from lightning_mmd.finite import first_not_finite
from lightning_mmd.networks import MLPFeatures, MLPGenerator

NAN, INF = math.nan, math.inf
AT = 4  # the update before which something goes wrong


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("position", [0, 3, 7])
def test_the_first_tensor_that_is_not_finite_is_named(bad, position):
    """Against a look at each of them, over types and shapes."""
    shapes = [(3,), (2, 2), (), (4, 1, 2), (1,), (0,), (5,), (2,)]
    kinds = [torch.float32, torch.float64, torch.bfloat16] * 3
    tensors = [torch.ones(shape, dtype=kind) for shape, kind in zip(shapes, kinds, strict=False)]
    named = [(str(index), tensor) for index, tensor in enumerate(tensors)]
    assert first_not_finite(named) is None
    assert first_not_finite([]) is None
    assert first_not_finite([("n", torch.ones(2, dtype=torch.long))]) is None
    tensors[1].fill_(1e30)  # finite, though its norm is not
    assert first_not_finite(named) is None
    tensors[position].view(-1)[-1] = bad
    expected = next(name for name, tensor in named if not tensor.isfinite().all())
    assert first_not_finite(named) == expected == str(position)


class Acts(Callback):
    """Does something before update AT, once; notes states before each batch."""

    def __init__(self, act=lambda trainer, module: None, at=(AT,)):
        self.act, self.at, self.states = act, list(at), []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step in self.at:
            self.at.remove(trainer.global_step)
            self.act(trainer, pl_module)
        self.states.append(copy.deepcopy(pl_module.state_dict()))


def setting(pick, value=NAN):
    def act(trainer, module):
        with torch.no_grad():
            pick(module).view(-1)[0] = value

    return act


def rate(value):
    def act(trainer, module):
        for optimizer in trainer.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = value

    return act


def poison(trainer, module):
    state = next(iter(trainer.optimizers[0].state.values()))
    state["exp_avg"].view(-1)[0] = NAN


def model(make=closed_form, **kwargs):
    torch.manual_seed(0)
    generator = MLPGenerator(2, 3, (8,))
    generator.layers[-1].bias.requires_grad_(False)
    critic = LearnedKernelCritic(MLPFeatures(2, 4, (8,)), 4)

    def adam(parameters):
        return torch.optim.Adam(parameters, 1e-3)

    return make(generator, critic, latents=3, generator_optimizer=adam, **kwargs)


def fit(tmp_path, module, *callbacks, steps=8, **kwargs):
    data = torch.randn(96, 2, generator=torch.Generator().manual_seed(0))
    saver = ModelCheckpoint(tmp_path / "saved", every_n_train_steps=1, save_last=True)
    trainer = quiet_trainer(
        tmp_path,
        max_steps=steps,
        enable_checkpointing=True,
        callbacks=[*callbacks, saver],
        **kwargs,
    )
    trainer.fit(module, DataLoader(data, batch_size=16, drop_last=True))
    return trainer


FAULTS = {
    "a generator's parameter": (
        setting(lambda m: m.generator.layers[0].weight),
        r"the parameter generator\.layers\.0\.weight is not finite at generator update 4",
    ),
    "infinity": (setting(lambda m: m.generator.layers[0].bias, INF), r"generator\.layers\.0\.bias"),
    "a frozen parameter": (
        setting(lambda m: m.generator.layers[-1].bias),
        r"the parameter generator\.layers\.2\.bias",
    ),
    "a critic's parameter": (
        setting(lambda m: m.critic.features.layers[0].weight),
        r"the parameter critic\.features\.layers\.0\.weight",
    ),
    "the witness weights": (setting(lambda m: m.critic.weights), r"the parameter critic\.weights"),
    "an optimizer's state": (
        poison,
        r"exp_avg of generator\.layers\.0\.weight in the generator's optimizer",
    ),
    "a learning rate": (rate(NAN), "the learning rate of the generator is not finite"),
    "a number of the rule": (
        lambda trainer, module: setattr(module.rule, "alpha", NAN),
        r"alpha of (ClosedForm|GradientAscent) is not finite",
    ),
}


@pytest.mark.parametrize("make", [closed_form, ascent])
@pytest.mark.parametrize("fault", FAULTS)
def test_it_is_found_in_the_update_named_and_nothing_has_moved(fault, make, tmp_path):
    act, words = FAULTS[fault]
    module, acts = model(make), Acts(act)
    with pytest.raises(DivergedError, match=words):
        fit(tmp_path, module, acts)
    assert module.trainer.global_step == AT
    for name, value in module.state_dict().items():
        before = acts.states[-1][name]
        assert torch.equal(value.nan_to_num(7.5), before.nan_to_num(7.5)), name
    for path in (tmp_path / "saved").iterdir():
        saved = read_checkpoint(path)
        assert saved["global_step"] == AT
        assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_a_negative_learning_rate_is_refused(tmp_path):
    with pytest.raises(
        ValueError, match=r"learning rate of the generator is -1\. It must be at lea"
    ):
        fit(tmp_path, model(), Acts(rate(-1.0)))


@pytest.mark.parametrize("make", [closed_form, ascent])
def test_a_learning_rate_that_jumps_is_refused_before_anything_moves(make, tmp_path):
    """Up to 1e5 times what the optimizer was built with, 1e-3 here, is the user's own affair."""
    module, acts = model(make), Acts(rate(101.0))
    with pytest.raises(
        ValueError,
        match=r"rate of the generator has diverged: it is 101, .* built with 0\.001\. Look at what",
    ):
        fit(tmp_path, module, acts)
    assert module.trainer.global_step == AT
    for name, value in module.state_dict().items():
        assert torch.equal(value, acts.states[-1][name]), name


def test_a_schedule_may_climb_above_what_the_optimizer_was_built_with(tmp_path):
    """OneCycleLR does not look at the optimizer's rate: 1e-9 here, 1e-3 at its top."""
    module = model(
        critic_optimizer=lambda p: torch.optim.Adam(p, 1e-9),
        critic_scheduler=lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1e-3, total_steps=8),
    )
    assert fit(tmp_path, module, steps=7).global_step == 7


def test_the_generator_stays_where_only_the_critics_gradient_overflows(tmp_path):
    """Each element of the critic's gradient is finite at this scale, and its norm is not."""
    torch.manual_seed(0)
    critic = LearnedKernelCritic(MLPFeatures(2, 8, (8,)), 8)
    module = closed_form(MLPGenerator(2, 3, (8,)), critic, latents=3, beta=0.1).float()
    before = copy.deepcopy(module.state_dict())
    trainer = quiet_trainer(tmp_path, max_steps=2)
    data = 1e12 * torch.randn(32, 2).float()
    with pytest.raises(DivergedError, match="gradient of the critic is not finite at gen"):
        trainer.fit(module, DataLoader(data, batch_size=16))
    assert trainer.global_step == 0
    for name, value in before.items():
        assert torch.equal(module.state_dict()[name], value), name


def test_latents_that_are_not_finite_are_named(tmp_path):
    def draw(num):
        z = torch.randn(num, 3)
        if draw.bad:
            z[0] = NAN
        return z

    draw.bad = False
    module = model()
    module.latents = type(module.latents).of(draw)
    with pytest.raises(ValueError, match="the latents hold NaN or infinite values"):
        fit(tmp_path, module, Acts(lambda *_: setattr(draw, "bad", True)))


def test_what_is_not_finite_is_never_saved(tmp_path):
    class Late(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step == AT:
                setting(lambda m: m.generator.layers[0].weight)(trainer, pl_module)

    with pytest.raises(DivergedError, match=r"so this state is not saved\. Go on from the last"):
        fit(tmp_path, model(), Late())
    saved = read_checkpoint(tmp_path / "saved" / "last.ckpt")
    assert saved["global_step"] == AT - 1
    assert all(value.isfinite().all() for value in saved["state_dict"].values())


def test_infinite_buffers_are_saved(tmp_path):
    """A mask of attention is one."""
    module = model()
    module.generator.register_buffer("mask", torch.tensor([0.0, -INF]))
    fit(tmp_path, module, steps=1)
    saved = read_checkpoint(tmp_path / "saved" / "last.ckpt")
    assert saved["state_dict"]["generator.mask"][1] == -INF


# OnDivergence


def test_a_state_is_looked_at_once_an_update_and_before_it_is_kept_or_saved(tmp_path, monkeypatch):
    from lightning_mmd import module as of_updates
    from lightning_mmd.callbacks import divergence as of_callback

    looks = {"update": [], "callback": []}
    for name, place in (("update", of_updates), ("callback", of_callback)):

        def look(*args, name=name, real=place.refuse_not_finite):
            looks[name].append(trainer.global_step)
            real(*args)

        monkeypatch.setattr(place, "refuse_not_finite", look)
    data = torch.randn(96, 2, generator=torch.Generator().manual_seed(0))
    savers = [OnDivergence(every_n_steps=5), ModelCheckpoint(tmp_path, every_n_train_steps=4)]
    trainer = quiet_trainer(tmp_path, max_steps=9, callbacks=savers, enable_checkpointing=True)
    trainer.fit(model(), DataLoader(data, batch_size=8))
    assert looks == {"update": list(range(9)), "callback": [4, 5, 8, 9]}  # the last: its end


def test_raise_names_a_state_of_well_before(tmp_path):
    keeper = OnDivergence("raise", every_n_steps=2)
    act = FAULTS["a generator's parameter"][0]
    with pytest.raises(DivergedError, match=r"A state of well before is .*good_before\.ckpt"):
        fit(tmp_path, model(), Acts(act, at=[5]), keeper)
    steps = {path.name: read_checkpoint(path)["global_step"] for path in tmp_path.rglob("good*")}
    assert steps == {"good.ckpt": 4, "good_before.ckpt": 2}


@pytest.mark.parametrize("make", [closed_form, ascent])
def test_restore_puts_the_good_state_back_and_halves_the_rates(make, tmp_path):
    """Weights, Adam's moments, average and rule are those of the file; clocks go on."""
    found = {}

    class Looks(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if keeper.restores == 1 and not found:
                optimizer = trainer.optimizers[0]
                found.update(
                    weights=copy.deepcopy(pl_module.state_dict()),
                    optimizer=copy.deepcopy(optimizer.state_dict()),
                    rule=copy.deepcopy(pl_module.rule.state_dict()),
                    average=copy.deepcopy(average.averaged_generator.state_dict()),
                    good=read_checkpoint(tmp_path / "saved" / "good_before.ckpt"),
                    clocks=(pl_module.critic_step, trainer.global_step),
                )

    keeper, average = OnDivergence("restore", every_n_steps=2), GeneratorEMA(3)
    act = FAULTS["a generator's parameter"][0]
    with pytest.warns(UserWarning, match=r"Went back to .*good_before.*rates of .* \(1 of 3\)"):
        trainer = fit(tmp_path, model(make), Acts(act, at=[5]), average, keeper, Looks())
    assert trainer.global_step == 8
    assert keeper.restores == 1
    good = found["good"]
    assert good["global_step"] == 2
    for name, value in good["state_dict"].items():
        assert torch.equal(found["weights"][name], value), name
    for index, state in good["optimizer_states"][0]["state"].items():
        for name, value in state.items():
            assert torch.equal(found["optimizer"]["state"][index][name], value)
    for name, value in good["mmdgan"]["average"].items():
        assert torch.equal(found["average"][name], value)
    assert repr(found["rule"]) == repr(good["mmdgan"]["rule_state"])
    assert found["clocks"] == (5, 5)
    assert found["optimizer"]["param_groups"][0]["lr"] == 5e-4
    assert all(p.isfinite().all() for p in trainer.lightning_module.parameters())


def test_returns_are_bounded_and_survive_a_resume(tmp_path):
    keeper = OnDivergence("restore", every_n_steps=1, max_tries=2, factor=0.1)
    act = FAULTS["a generator's parameter"][0]
    acts = Acts(act, at=[3, 4, 5])
    with (
        pytest.warns(UserWarning, match="Went back"),
        pytest.raises(DivergedError, match="2 returns to a good state did not help"),
    ):
        fit(tmp_path, model(), acts, keeper)
    assert keeper.state_dict() == {"restores": 2}
    other = OnDivergence()
    other.load_state_dict({"restores": 2})
    assert other.restores == 2


def test_data_that_are_not_finite_are_no_divergence(tmp_path):
    keeper = OnDivergence("restore", every_n_steps=1)
    data = torch.full((32, 2), NAN)
    trainer = quiet_trainer(tmp_path, max_steps=2, callbacks=[keeper])
    with pytest.raises(ValueError, match="real data holds NaN"):
        trainer.fit(model(), DataLoader(data, batch_size=16))
    assert keeper.restores == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"action": "stop"}, "action must be 'raise' or 'restore', got 'stop'"),
        ({"every_n_steps": 0}, "every_n_steps and max_tries, integers of at least 1, got 0 and 3"),
        ({"max_tries": 0}, "of at least 1, got 100 and 0"),
        ({"factor": 0.0}, r"factor must be in \(0, 1\], got 0.0"),
        ({"factor": NAN}, r"factor must be in \(0, 1\], got nan"),
    ],
)
def test_arguments_out_of_range(arguments, words):
    with pytest.raises(ValueError, match=words):
        OnDivergence(**arguments)


def test_another_module_is_refused(tmp_path):
    from lightning.pytorch.demos.boring_classes import BoringModel

    with pytest.raises(TypeError, match="OnDivergence needs an MMDGAN, got BoringModel"):
        quiet_trainer(tmp_path, max_steps=1, callbacks=[OnDivergence()]).fit(BoringModel())


def test_nothing_is_written_in_a_fast_dev_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    data = DataLoader(torch.randn(32, 2), batch_size=16)
    quiet_trainer(tmp_path, fast_dev_run=True, callbacks=[OnDivergence()]).fit(model(), data)
    assert not [path for path in Path(tmp_path).rglob("*.ckpt")]
