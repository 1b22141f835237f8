"""Every example runs, with few steps, and the README's Python does what it says."""

import importlib.util
import itertools
import math
import re
import warnings
from pathlib import Path

import pytest
import torch

from lightning_mmd import ClosedForm, DeepKernel, GradientAscent
from lightning_mmd.noise import ConstantNoise, GeometricNoise
from lightning_mmd.verdicts import swings

ROOT = Path(__file__).parent.parent


@pytest.fixture(autouse=True)
def as_a_script(monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.syspath_prepend(ROOT / "examples")


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("rule", [ClosedForm, GradientAscent, DeepKernel])
def test_a_plain_loop_and_lightning_train_alike(rule, tmp_path, monkeypatch):
    """Bit for bit, over the end of an epoch."""
    monkeypatch.chdir(tmp_path)
    plain = load(ROOT / "examples/plain_pytorch.py")
    generator = plain.main(rule(), 30)
    model = load(ROOT / "examples/lightning_digits.py").main(rule(), 30)
    start, _ = plain.networks(rule())
    for (name, p), q, r in zip(
        generator.named_parameters(),
        model.generator.parameters(),
        start.parameters(),
        strict=True,
    ):
        assert torch.equal(p, q), name
        assert not torch.equal(p, r), name
    lines = (ROOT / "examples/plain_pytorch.py").read_text().splitlines()
    assert len(lines) < 60


def test_the_readme_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    code = first.replace("max_steps=200", "max_steps=2, logger=False")
    scope: dict = {}
    exec(code, scope)
    assert scope["images"].shape == (64, 1, 8, 8)
    assert scope["model"].critic_step == 2


def test_the_descent_certificate_holds(tmp_path):
    pytest.importorskip("matplotlib")
    tables = load(ROOT / "examples/descent_certificate.py").main(
        seeds=(0,),
        num_halvings=5,
        horizon=0.08,
        betas=(1.0, 1e-3),
        decay_horizon=0.4,
        directory=tmp_path,
    )
    finest, (identity,) = tables["certificate"][-1], tables["identity"]
    assert 0.98 < finest["ratio_min"] < finest["ratio_max"] < 1.02
    assert 0.9 < identity["order"] < 1.1
    assert identity["error_at_dt_0"] < 1e-6
    assert identity["speed_error"] < 1e-6
    slow, fast = tables["decay"]
    ideal = fast["exp(-2t/alpha)"]
    assert 0.98 * ideal < fast["F_end/F_start"] < 1.1 * ideal < slow["F_end/F_start"]
    assert fast["path_length"] == pytest.approx(fast["length_beta_0"], rel=0.1)
    assert (tmp_path / "results/descent_certificate.csv").read_text().count("\n") == 7
    assert (tmp_path / "figures/descent_certificate.png").stat().st_size > 10_000


def test_kernel_gan_modes_are_those_that_theory_predicts(tmp_path):
    pytest.importorskip("matplotlib")
    tables = load(ROOT / "examples/kernel_gan_modes.py").main(
        sweep_steps=600, grid_steps=110, grid_bandwidths=(1.0,), map_size=8, directory=tmp_path
    )
    assert len(tables["rates"]) >= 20
    assert max(row["error"] for row in tables["rates"]) < 1e-6
    diverging, _, stuck, _, recovering = (row["fitted_masses"] for row in tables["sweep"])
    assert diverging > 50
    assert 2.0 < stuck < 2.5
    assert recovering < 1.8
    grid = tables["grid"]
    assert all(row["radius_suggested"] < row["radius"] for row in grid)
    settled = [row for row in grid if row["radius_suggested"] < 0.98]
    assert all(row["distance2_suggested"] < row["distance2"] for row in settled)
    assert 1e-14 < grid[0]["distance2"] < 1e-9  # published: about 1e-12 after 110 steps
    assert (tmp_path / "results/kernel_gan_grid.csv").read_text().count("\n") == 13
    assert (tmp_path / "figures/kernel_gan_modes.png").stat().st_size > 10_000


def test_witness_fields_point_to_the_missing_modes(tmp_path):
    pytest.importorskip("matplotlib")
    rows = load(ROOT / "examples/witness_fields.py").main(
        num_steps=120, num_draws=64, resolution=40, directory=tmp_path
    )
    plain, regularised, noisy = (
        {k: float(v) for k, v in row.items() if k != "field"} for row in rows
    )
    assert plain["alignment"] == pytest.approx(1.0, abs=1e-6)
    for row in (regularised, noisy):
        assert 0.2 < row["alignment"] < 0.95  # descends, elsewhere than the plain gradient
    for row in (plain, regularised, noisy):
        assert row["modes"] == 3
        assert row["mmd2_end"] < 0.7 * row["mmd2"]
    assert (tmp_path / "results/witness_fields.csv").read_text().count("\n") == 4
    assert (tmp_path / "figures/witness_fields.png").stat().st_size > 10_000


def test_the_monitor_tells_made_games_apart(tmp_path):
    example = load(ROOT / "examples/convergence_monitor.py")
    *cases, sound, cycling = example.CASES
    rows = example.main(seeds=(100,), cases=cases, directory=tmp_path)
    assert [row["case"] for row in rows if not row["right"]] == []
    assert len(rows) == 6
    assert (tmp_path / "results/convergence_monitor.csv").read_text().count("\n") == 7
    monitor = example.play(100, example.CASES[sound]._replace(num_updates=400))
    assert monitor.verdict.name in ("converging", "converged")
    monitor = example.play(100, example.CASES[cycling]._replace(num_updates=400, every_n_steps=8))
    assert monitor.verdict.name not in ("converging", "converged")
    assert min(monitor.traces.mmd2[25:]) > 2 * monitor.floor


def test_the_bilinear_game_turns_at_the_rate_of_theory():
    example = load(ROOT / "examples/convergence_monitor.py")
    traces = example.play(3, example.CASES["alpha = 0, bilinear"]).traces
    # With steps of eta the angle grows by eta a step: the parameters cross 0 twice a turn.
    assert swings(traces.projection) == pytest.approx(2 * 400 * 0.05 / (2 * math.pi), abs=1)
    assert traces.steps[-1] == 400


def test_a_foreign_gan_gains_from_the_penalty(tmp_path):
    plain, penalised, noisy = load(ROOT / "examples/drop_in.py").main(
        num_updates=100, seeds=(0,), alphas=(10.0,), directory=tmp_path
    )
    assert 0 < penalised["mean"] < 0.8 * plain["mean"]
    assert noisy["mean"] > 0
    assert noisy["mean"] != plain["mean"]
    assert (tmp_path / "results/drop_in.csv").read_text().count("\n") == 4


def test_steps_can_be_halved_with_the_penalty_and_not_without(tmp_path):
    pytest.importorskip("matplotlib")
    tables = load(ROOT / "examples/step_halving.py").main(
        seeds=(1,), num_steps=160, directory=tmp_path
    )
    regularised, *cycling = tables["step_halving"]
    last = "distance_1/2_1/4"
    assert regularised["verdict"] == "converged"
    assert regularised["mmd2_end"] < 0.2
    for row in cycling:
        assert row["verdict"] != "converged"
        assert row[last] > 5 * regularised[last]
        assert row["mmd2_end"] > 0.4
    for row in tables["step_halving_bilinear"]:
        tau = row["tau"]  # the half axes of x^2 + y^2 + tau x y = 1
        assert row["drift"] < 1e-12
        assert row["radius_max"] == pytest.approx((1 - tau / 2) ** -0.5, rel=1e-2)
        assert row["radius_min"] == pytest.approx((1 + tau / 2) ** -0.5, rel=1e-2)
    assert (tmp_path / "results/step_halving.csv").read_text().count("\n") == 4
    assert (tmp_path / "figures/step_halving.png").stat().st_size > 10_000


def test_a_mixture_of_gaussians_needs_alpha(tmp_path):
    pytest.importorskip("matplotlib")
    tables = load(ROOT / "examples/mixture_of_gaussians.py").main(
        seeds=(0, 1),
        num_updates=200,
        num_closed_updates=24,
        num_held_out=4096,
        methods=("alpha = 0", "alpha = 100", "closed form"),
        directory=tmp_path,
    )
    plain, penalised, closed = tables["summary"]
    assert 0.1 < plain["mmd2_median"] < 2
    assert 1e-4 < penalised["mmd2_median"] < plain["mmd2_median"] / 5
    assert 0 < closed["own_points_median"] < penalised["own_points_median"] / 5
    assert plain["covers_all"] == 0
    assert closed["covers_all"] == 2
    excursions = [row["largest_excursion"] for row in tables["runs"]]
    assert min(excursions[:2]) > 3 * max(excursions[2:])
    assert (tmp_path / "results/mixture_of_gaussians.csv").read_text().count("\n") == 7
    assert (tmp_path / "figures/mixture_of_gaussians.png").stat().st_size > 10_000


def test_the_games_of_the_mixture_are_independent_and_alpha_is_a_unit(monkeypatch):
    example = load(ROOT / "examples/mixture_of_gaussians.py")
    single, pair = example.ascend([1], 6)[0], example.ascend([0, 1], 6)[1]
    assert pair.curve == pytest.approx(single.curve, rel=1e-4)
    monkeypatch.setattr(example, "CRITIC_LR", 100 * example.CRITIC_LR)
    scaled = example.ascend(
        [1], 6, alpha=1.0, beta=example.BETA / 100, generator_lr=example.GENERATOR_LR / 100
    )[0]
    assert scaled.curve == pytest.approx(single.curve, rel=1e-4)
    assert single.curve[0] - single.curve[-1] > 1e-3  # the games have begun
    assert example.num_rebounds([1.0, 0.1, 0.12, 1.0, 0.9, 0.1, 0.2]) == 2
    assert example.num_rebounds([1.0, 0.5, 0.1, 0.11, 0.05]) == 0


def test_noise_frees_a_point_flow_that_is_stuck(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    example = load(ROOT / "examples/point_flow.py")
    few = {"geometric": GeometricNoise(2.0, 0.99), "constant": ConstantNoise(1.0, 300)}
    monkeypatch.setattr(example, "hand_tuned", lambda _: few)
    tables = example.main(
        seeds=2, tuning_seeds=2, num_steps=500, num_particles=40, directory=tmp_path
    )
    fresh = [row for row in tables["schedules"] if row["seeds"] == "200-201"]
    ends = {row["noise"]: row["mmd2_median"] for row in fresh}
    tuned = {row["noise"]: row["mmd2_median"] for row in tables["schedules"] if row not in fresh}
    assert tuned.keys() == few.keys()
    assert fresh[4]["noise"] == min(tuned, key=tuned.__getitem__)
    assert (fresh[4]["over_best_tuned"], fresh[4]["standard_error"]) == (1, 0)
    assert example.paired_ratio([1.0, 8.0], [1.0, 2.0])["over_best_tuned"] == pytest.approx(2)
    assert ends["no noise"] > 0.01
    assert ends["AdaptiveNoise"] > 0.5 * ends["no noise"]  # its level is bounded by the kernel's
    assert 0 < ends["PlateauNoise"] < 0.5 * ends["no noise"]
    modes = {(row["noise"], row["seed"]): row["modes"] for row in tables["ends"]}
    assert all(modes["PlateauNoise", seed] > modes["no noise", seed] for seed in (200, 201))
    assert all(0 <= row["stuck"] <= 1 + 1e-6 for row in tables["ends"])
    assert (tmp_path / "results/point_flow.csv").read_text().count("\n") == 9
    assert (tmp_path / "figures/point_flow.png").stat().st_size > 10_000


def test_the_grid_of_the_point_flow_is_what_its_names_say():
    grid = load(ROOT / "examples/point_flow.py").hand_tuned(1000)
    assert len(grid) == 36
    assert grid["constant 0.5 until 250"].level(249) == 0.5
    assert grid["constant 0.5 until 250"].level(250) == 0.0
    assert grid["2.0 halved every 50"].level(999) == 2.0**-18
    assert grid["geometric 2.0 to 0.1 of it"].level(1000) == pytest.approx(0.2)


def test_a_shrinking_bandwidth_is_faster_than_a_fixed_one(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    example = load(ROOT / "examples/bandwidth_annealing.py")
    monkeypatch.setattr(example, "FIXED", (0.5, 1.5, 3.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rows = example.main(
            seeds=1, num_steps=300, num_updates=4, num_particles=48, directory=tmp_path
        )
    points = {row["bandwidth"]: row for row in rows if row["training"] == "points"}
    best = min(points[width]["w2_median"] for width in ("0.5", "1.5", "3"))
    assert points["3 to 0.1"]["w2_median"] < 0.7 * best
    assert points["3 to 0.1"]["steps_to_best_fixed"] <= 200
    generator = [row for row in rows if row["training"] == "generator"]
    assert [row["bandwidth"] for row in generator] == ["0.5", "1.5", "3", "3 to 0.35"]
    assert len({row["w2_median"] for row in generator}) == 4
    x, y = torch.randn(6, 2), torch.randn(6, 2)
    by_hand = min(
        (x - y[list(order)]).square().sum(1).mean() for order in itertools.permutations(range(6))
    )
    assert example.w2(x, y) == pytest.approx(float(by_hand), rel=1e-5)


def test_a_students_step_is_the_gradients_at_noisy_weights(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    torch.set_default_dtype(torch.float64)
    example = load(ROOT / "examples/student_teacher.py")
    game = example.Game(0, example.Sizes(5, 7, 9, 20, 20, 1, learning_rate=0.2))
    x, y = game.inputs[0], game.outputs[0]
    leaves = [w.clone().requires_grad_() for w in game.weights]
    energy = (y - example.particles(x, leaves).mean(1)).square().mean() / 2
    assert game.energy(held_out=False) == pytest.approx(energy.item(), rel=1e-12)
    gradients = torch.autograd.grad(7 / 2 * energy, leaves)  # m / 2 times that of F
    with torch.no_grad():
        game.step(x, y, 0.0)
    for before, now, gradient in zip(leaves, game.weights, gradients, strict=True):
        torch.testing.assert_close(now, before - 0.2 * gradient, rtol=1e-12, atol=1e-14)
    torch.set_default_dtype(torch.float32)
    monkeypatch.setattr(example, "SCALED", example.Sizes(10, 40, 40, 400, 20, 30, 1.0))
    noisy, plain = example.main(directory=tmp_path)
    assert noisy["F_start"] == plain["F_start"] > 0.1
    assert 0 < noisy["F_end"] < 0.8 * noisy["F_start"]
    assert plain["F_end"] != noisy["F_end"]
    assert (tmp_path / "results/student_teacher.csv").read_text().count("\n") == 3
    assert (tmp_path / "figures/student_teacher.png").stat().st_size > 5_000


def test_a_students_noise_has_the_moments_of_noise_on_all_weights():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    noise = load(ROOT / "examples/student_teacher.py").Noise
    hidden, slopes, num = torch.rand(2, 3) + 0.3, torch.randn(2, 4), 8_000

    def naive():
        v = torch.randn(4, 3)
        return torch.cat([(hidden @ v.T).flatten(), (slopes @ v).flatten()])

    def ours():
        drawn = noise(hidden, 4)
        return torch.cat([drawn.forward.flatten(), drawn.backward(slopes).flatten()])

    a, b = (torch.stack([draw() for _ in range(num)]) for draw in (naive, ours))
    expected, moments = a.T @ a / num, b.T @ b / num
    scale = expected.diagonal().sqrt()
    error = (2 / num) ** 0.5 * torch.outer(scale, scale)
    assert float(((moments - expected) / error).abs().max()) < 5
    assert float((b.mean(0) / scale).abs().max()) < 5 / num**0.5


# What a reader runs first


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_rates_are_searched_by_optuna(capsys):
    optuna = pytest.importorskip("optuna")
    example = load(ROOT / "examples/tune_rates.py")
    told = []

    def report(trial, value, step):
        told.append((trial.number, step, value))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optuna.Trial, "report", report)
        patch.setattr(optuna.Trial, "should_prune", lambda trial: trial.number == 1)
        study = example.main(trials=2, updates=100)
    assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
    assert [entry[:2] for entry in told] == [(0, 100), (1, 100)]
    assert study.best_value == told[0][2]
    assert study.trials[0].params != study.trials[1].params
    assert "1 of 2 trials ran to the end" in capsys.readouterr().out


def test_the_notebook_and_its_twin_hold_the_same_cells():
    jupytext = pytest.importorskip("jupytext")
    twin = jupytext.read(ROOT / "examples/quickstart.py")
    notebook = jupytext.read(ROOT / "examples/quickstart.ipynb")
    cells = [[(cell.cell_type, cell.source) for cell in n.cells] for n in (twin, notebook)]
    assert cells[0] == cells[1]
    assert all(c.outputs for c in notebook.cells if c.cell_type == "code" and "show(" in c.source)


@pytest.mark.filterwarnings("ignore")
def test_the_notebook_runs_from_top_to_bottom(tmp_path, monkeypatch):
    """Its cells, with 30 updates in place of 600; each prints or draws what its text announces."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    source = (ROOT / "examples/quickstart.py").read_text()
    assert "\nSTEPS = 600\n" in source
    names = {"__name__": "quickstart"}
    exec(compile(source.replace("STEPS = 600", "STEPS = 30"), "quickstart.py", "exec"), names)
    assert names["tracker"].history[-1]["mmd2"] < names["tracker"].history[0]["mmd2"]
    ratios = [float(row["certificate/ratio"]) for row in names["rows"]]
    assert ratios
    assert 0.3 < ratios[-1] < 1.1
