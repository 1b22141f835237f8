"""No file runs code, neither checkpoint nor configuration, and no secret is written."""

import copy
import json
import pickle
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_mmd import MMDGAN
from lightning_mmd.cli import main
from lightning_mmd.masking import mask, masked
from lightning_mmd.safety import Checkpoint, Configuration, UntrustedError

# What newer releases of jsonargparse say of some of these before they are refused here.
pytestmark = pytest.mark.filterwarnings(r"ignore:\s*Importing '.*' is not allowed")

CONFIGS = Path(__file__).parent.parent / "configs"
QUIET = [
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
    "--trainer.callbacks=[]",
    "--trainer.limit_val_batches=0",
]
MARK = "RUN"  # a file that exists where a file's code has run
EVIL = f"open({MARK!r}, 'w').close()\nimport torch\nclass Net(torch.nn.Identity): ...\n"


@pytest.fixture(autouse=True)
def in_a_folder_with_a_hostile_module(tmp_path, monkeypatch):
    torch.set_default_dtype(torch.float32)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    Path("evil.py").write_text(EVIL)
    yield
    sys.modules.pop("evil", None)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """What a checkpoint of the command line holds."""
    torch.set_default_dtype(torch.float32)
    root = tmp_path_factory.mktemp("saved")
    main(
        [
            "fit",
            f"--config={CONFIGS}/digits.yaml",
            "--trainer.max_steps=1",
            *QUIET,
            "--trainer.callbacks=ModelCheckpoint",
            f"--trainer.callbacks.dirpath={root}/saved",
            f"--trainer.logger.save_dir={root}",
        ]
    )
    return torch.load(root / "saved" / "last.ckpt", weights_only=True)


def spec(path, **arguments):
    return {"class_path": path, "init_args": arguments}


def linear(device):
    return spec("torch.nn.Linear", in_features=2, out_features=2, device=device)


COMMAND = f"touch {MARK}"
PAYLOADS = {
    "os.system": spec("os.system", command=COMMAND),
    "posix.system": spec("posix.system", command=COMMAND),
    "subprocess.Popen": spec("subprocess.Popen", args=COMMAND, shell=True),
    "subprocess.getoutput": spec("subprocess.getoutput", cmd=COMMAND),
    "builtins.exec": spec("builtins.exec", source=EVIL),
    "torch.utils.collect_env.run": spec("torch.utils.collect_env.run", command=COMMAND),
    "torch.hub.load": spec("torch.hub.load", repo_or_dir=".", model="x", source="local"),
    "torch.load": spec("torch.load", f="evil.pkl", weights_only=False),
    "runpy.run_path": spec("runpy.run_path", path_name="evil.py"),
    "importlib.import_module": spec("importlib.import_module", name="evil"),
    "a function through this package": spec("lightning_mmd.cli.os.system", command=COMMAND),
    "a function through torch.nn": spec("torch.nn.modules.module.warnings.sys.exit", status="x"),
    "a class that starts a process": spec(
        "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler",
        entrypoint="touch",
        args=[MARK],
        env={},
        stdout=None,
        stderr=None,
        local_rank_id=0,
    ),
    "torch.multiprocessing.Process": spec("torch.multiprocessing.Process", target="os.system"),
    "a module beside": spec("evil.Net"),
    "a network of torchmetrics": spec("torchmetrics.MeanMetric"),
}
PLACES = {
    "generator_optimizer": lambda bad: {"generator_optimizer": bad},
    "generator_scheduler": lambda bad: {"generator_scheduler": bad},
    "latents": lambda bad: {"latents": bad},
    "rule": lambda bad: {"rule": bad},
    "generator": lambda bad: {"generator": bad},
    "an untyped argument": lambda bad: {"critic": linear(bad)},
    "an untyped argument, as text": lambda bad: {"critic": linear(yaml.safe_dump(bad))},
    "a list": lambda bad: {"critic": linear([bad])},
    "dict_kwargs, as text with escapes": lambda bad: {
        "critic": spec("torch.nn.Linear", in_features=2, out_features=2)
        | {"dict_kwargs": {"device": json.dumps(bad).replace("_", "\\u005f")}}
    },
    "dict_kwargs": lambda bad: {
        "critic": spec("torch.nn.Linear", in_features=2, out_features=2)
        | {"dict_kwargs": {"device": bad}}
    },
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_checkpoint_builds_nothing_that_runs_code(saved, payload, place):
    """16 payloads at 10 places: 160 hostile checkpoints, none of which runs anything."""
    hostile = copy.deepcopy(saved)
    hostile["hyper_parameters"] |= PLACES[place](copy.deepcopy(PAYLOADS[payload]))
    torch.save(hostile, "hostile.ckpt")
    with pytest.raises(UntrustedError):
        MMDGAN.load_from_checkpoint("hostile.ckpt")
    assert not Path(MARK).exists()
    assert "evil" not in sys.modules


@pytest.mark.parametrize(
    "path", ["evil.Net", "os._exit", "evil.draw", "torch.utils.collect_env.run", "builtins.exec"]
)
def test_a_bare_path_in_a_checkpoint_is_not_followed(saved, path):
    for name in ("latents", "generator"):
        hostile = copy.deepcopy(saved)
        hostile["hyper_parameters"][name] = path
        torch.save(hostile, "hostile.ckpt")
        with pytest.raises(UntrustedError):
            MMDGAN.load_from_checkpoint("hostile.ckpt")
    assert not Path(MARK).exists()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("_instantiator", "evil.build"),
        ("_instantiator", "os.system"),
        ("_class_path", "evil.Net"),
        ("_class_path", "torch.nn.Identity"),
    ],
)
def test_a_checkpoint_does_not_choose_who_builds(saved, key, value):
    hostile = copy.deepcopy(saved)
    hostile["hyper_parameters"][key] = value
    torch.save(hostile, "hostile.ckpt")
    with pytest.raises(UntrustedError):
        MMDGAN.load_from_checkpoint("hostile.ckpt")
    assert not Path(MARK).exists()


class Runs:
    """A pickle that runs a command where it is read."""

    def __reduce__(self):
        import os

        return os.system, (COMMAND,)


def pickled(kind, saved):
    if kind == "plain pickle":
        Path("hostile.ckpt").write_bytes(pickle.dumps(Runs()))
    elif kind == "pickle in a checkpoint":
        torch.save(saved | {"x": Runs()}, "hostile.ckpt")
    else:
        torch.save(saved | {"x": Runs()}, "hostile.ckpt", _use_new_zipfile_serialization=False)


@pytest.mark.parametrize("kind", ["plain pickle", "pickle in a checkpoint", "torch's old format"])
@pytest.mark.parametrize("way", ["load", "sample", "fit", "test", "python"])
def test_pickles_are_not_run(saved, kind, way, capsys, tmp_path):
    from tiny import quiet_trainer

    from lightning_mmd.data import DigitsDataModule

    model = MMDGAN(**networks())
    pickled(kind, saved)
    fit = [way, f"--config={CONFIGS}/digits.yaml", "--ckpt_path=hostile.ckpt", *QUIET]
    ways = {
        "load": lambda: MMDGAN.load_from_checkpoint("hostile.ckpt"),
        "sample": lambda: main(["sample", "--ckpt_path=hostile.ckpt"]),
        "fit": lambda: main([*fit, "--trainer.max_steps=2"]),
        "test": lambda: main(fit),
        "python": lambda: quiet_trainer(tmp_path, max_steps=1).fit(
            model, DigitsDataModule(), ckpt_path="hostile.ckpt"
        ),
    }
    with pytest.raises((ValueError, SystemExit)) as caught:
        ways[way]()
    message = str(caught.value)
    if way in ("sample", "fit", "test"):
        assert caught.value.code == 2
        message = capsys.readouterr().err
    assert "cannot be read as a checkpoint" in message
    assert not Path(MARK).exists()


def networks():
    from lightning_mmd import LearnedKernelCritic
    from lightning_mmd.networks import ConvFeatures, ConvGenerator

    features = ConvFeatures((1, 8, 8), 8, channels=(4, 4))
    return {
        "generator": ConvGenerator((1, 8, 8), 32, channels=(4, 4)),
        "critic": LearnedKernelCritic(features, 8),
    }


@pytest.mark.parametrize("payload", sorted({*PAYLOADS} - {"a module beside"}))
@pytest.mark.parametrize("place", ["generator_optimizer", "an untyped argument"])
def test_a_configuration_builds_only_classes_that_fit(payload, place, capsys):
    """It may import, as the command line always did, but not call what is no fitting class."""
    if payload == "a network of torchmetrics" and place == "an untyped argument":
        pytest.skip("a network may be an argument")
    Path("hostile.yaml").write_text(yaml.safe_dump({"model": PLACES[place](PAYLOADS[payload])}))
    configs = [f"--config={CONFIGS}/digits.yaml", "--config=hostile.yaml"]
    # a network in place of an optimizer is harmless; jsonargparse 4.42 leaves it to who builds one
    harmless = payload == "a network of torchmetrics"
    for command in ("fit",) if harmless else ("fit", "doctor"):
        with pytest.raises(SystemExit) as caught:
            main([command, *configs, *(QUIET if command == "fit" else [])])
        assert caught.value.code == 2
        assert "Traceback" not in capsys.readouterr().err
        assert not Path(MARK).exists()


def test_what_a_checkpoint_may_build(saved, monkeypatch):
    """A user's own classes: where the program has imported them, or trusts them by name."""
    monkeypatch.delitem(sys.modules, "mynets", raising=False)  # of another test
    Path("mynets.py").write_text(
        "import torch\n"
        "from lightning_mmd.networks import ConvGenerator\n"
        "class Own(ConvGenerator): ...\n"
        "def draw(num): return torch.zeros(num, 32)\n"
    )
    own = copy.deepcopy(saved)
    own["hyper_parameters"]["generator"]["class_path"] = "mynets.Own"
    own["hyper_parameters"]["generator_optimizer"] = spec("torch.optim.SGD", lr=0.5)
    torch.save(own, "own.ckpt")
    with pytest.raises(UntrustedError, match=r"--trust mynets .*trust=\['mynets'\]"):
        MMDGAN.load_from_checkpoint("own.ckpt")
    assert "mynets" not in sys.modules
    main(["sample", "--ckpt_path=own.ckpt", "--num=2", "--trust=mynets"])
    assert Path("samples.png").is_file()
    monkeypatch.delitem(sys.modules, "mynets")
    model = MMDGAN.load_from_checkpoint("own.ckpt", trust=["mynets"])
    assert type(model.generator).__name__ == "Own"
    assert model.generator_optimizer([nn.Parameter(torch.ones(1))]).defaults["lr"] == 0.5
    assert type(MMDGAN.load_from_checkpoint("own.ckpt").generator).__name__ == "Own"  # imported now

    own["hyper_parameters"]["latents"] = "mynets.draw"
    torch.save(own, "own.ckpt")
    with pytest.raises(UntrustedError, match="latents names mynets"):  # a function
        MMDGAN.load_from_checkpoint("own.ckpt")
    model = MMDGAN.load_from_checkpoint("own.ckpt", trust="mynets")
    assert torch.equal(model.sample_latents(2), torch.zeros(2, 32))
    sys.modules.pop("mynets")


def test_a_module_that_is_to_be_trusted_must_exist(capsys, saved):
    torch.save(saved, "saved.ckpt")
    with pytest.raises(SystemExit):
        main(["sample", "--ckpt_path=saved.ckpt", "--trust=nothing_of_that_name"])
    assert "'nothing_of_that_name', which is to be trusted, cannot be" in capsys.readouterr().err


def test_arguments_of_the_program_replace_those_of_the_checkpoint(saved):
    hostile = copy.deepcopy(saved)
    hostile["hyper_parameters"]["generator"] = PAYLOADS["os.system"]
    torch.save(hostile, "hostile.ckpt")
    torch.manual_seed(1)
    generator = networks()["generator"]
    with pytest.raises(RuntimeError, match="size mismatch"):  # it was built from what was given
        MMDGAN.load_from_checkpoint("hostile.ckpt", generator=generator)


def test_policies_on_plain_specs():
    class Other: ...

    def takes(config, policy):
        try:
            policy.check(config, MMDGAN)
        except UntrustedError:
            return False
        return True

    relu, own = spec("torch.nn.ReLU"), Configuration()
    assert takes({"generator": relu}, own)
    assert takes({"generator": relu}, Checkpoint())
    assert takes({"x": {"y": [relu]}}, Checkpoint())
    assert not takes({"x": {"y": [spec("subprocess.Popen")]}}, own)
    assert not takes({"x": Other}, Checkpoint())
    assert takes({"x": nn.ReLU}, Checkpoint())
    assert not takes({"x": print}, own)
    assert not takes({"x": "{class_path: os.system, init_args: {command: ls}}"}, own)
    assert takes({"x": "class_path is a word here"}, own)


plain = st.none() | st.booleans() | st.integers() | st.text(max_size=8)
harmless = st.recursive(
    plain | st.just(spec("torch.nn.ReLU")),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["a", "b", "init_args"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(
    parts=st.lists(harmless, max_size=3),
    path=st.lists(st.sampled_from(["list", "dict", "spec", "text"]), max_size=4),
    payload=st.sampled_from(sorted({*PAYLOADS} - {"a network of torchmetrics"})),
)
@settings(max_examples=200, deadline=None, suppress_health_check=[*HealthCheck])
def test_a_payload_is_found_however_it_is_wrapped(parts, path, payload):
    """Lists, dictionaries, arguments of other classes and texts, nested at random."""
    bad = copy.deepcopy(PAYLOADS[payload])
    for kind in path:
        bad = {
            "list": lambda b: [*parts, b],
            "dict": lambda b: {"a": parts, "b": b},
            "spec": lambda b: spec("torch.nn.Linear", device=b),
            "text": yaml.safe_dump,
        }[kind](bad)
    with pytest.raises(UntrustedError):
        Checkpoint().check({"x": parts, "y": bad})
    Checkpoint().check({"x": parts})
    assert "evil" not in sys.modules


@given(text=st.text(max_size=60) | st.from_regex(r"(class_path: [a-z.:{}\[\] ]{0,30}\n?){1,2}"))
@settings(max_examples=200, deadline=None, suppress_health_check=[*HealthCheck])
def test_any_text_is_plain_or_refused(text):
    """The walk raises nothing but its own error, whatever YAML makes of a text."""
    for policy in (Configuration(), Checkpoint()):
        try:
            policy.check({"x": text})
        except UntrustedError:
            pass
        except ImportError:  # of a module that a configuration may name
            assert type(policy) is Configuration


@pytest.mark.parametrize(
    "path", ["..", "/.", ".x", "a..b", "os.path.", "torch.nn.Nothing", "a b.c"]
)
def test_a_path_of_no_class_is_named(path):
    for policy in (Configuration(), Checkpoint()):
        with pytest.raises(UntrustedError, match=r"class path|no Nothing|not imported"):
            policy.check({"x": {"class_path": path}})


SECRETS = {
    "api_key: 0123456789abcdef": "api_key: ***",
    '{"token": "abc", "x": 1}': '{"token": "***", "x": 1}',
    "--data.hf_token=abc --x=1": "--data.hf_token=*** --x=1",
    "password = geheim, user = me": "password = ***, user = me",
    "https://me:geheim@host/path": "https://me:***@host/path",
    f"key {'0123456789' * 4} of W&B": "key *** of W&B",
    f"hf_{'A1' * 15}": "***",
    f"ghp_{'a' * 36}": "***",
    "AKIAABCDEFGHIJKLMNOP": "***",
    "api_key: null": "api_key: null",
    "num_tokens: 3, tokenizer: x": "num_tokens: ***, tokenizer: x",
    "a plain line: nothing=here": "a plain line: nothing=here",
}


@pytest.mark.parametrize(("text", "expected"), SECRETS.items())
def test_secrets_are_masked(text, expected):
    assert mask(text) == expected
    assert mask(mask(text)) == expected


def test_secrets_are_masked_in_nested_data():
    secret = {"a": [{"token": "x"}, ("hf_" + "b" * 30,)], "n": 3, "password": "", "m": nn.ReLU}
    assert masked(secret) == {
        "a": [{"token": "***"}, ("***",)],
        "n": 3,
        "password": "",
        "m": nn.ReLU,
    }
    assert secret["a"][0]["token"] == "x"


def test_a_secret_of_a_configuration_is_not_written(tmp_path, capsys):
    Path("secretive.py").write_text(
        "from lightning_mmd.networks import ConvGenerator\n"
        "class Own(ConvGenerator):\n"
        "    def __init__(self, hub_token: str, **kwargs):\n"
        "        super().__init__(**kwargs)\n"
        "        self.seen = hub_token\n"
        "class Fails(Own):\n"
        "    def __init__(self, hub_token: str, **kwargs):\n"
        "        raise ValueError(f'no login with hub_token={hub_token}')\n"
    )
    token = "hf_" + "Secret1234" * 3
    change = {"model": {"generator": {"class_path": "secretive.Own", "init_args": None}}}
    change["model"]["generator"]["init_args"] = {
        "sample_shape": [1, 8, 8],
        "latent_dim": 32,
        "channels": [4, 4],
        "hub_token": token,
    }
    Path("own.yaml").write_text(yaml.safe_dump(change))
    arguments = [f"--config={CONFIGS}/digits.yaml", "--config=own.yaml", "--trainer.max_steps=1"]
    main(["fit", *arguments, *QUIET, "--trainer.logger.save_dir=logs"])
    written = [path for path in Path("logs").rglob("*") if path.suffix in (".yaml", ".csv")]
    assert len(written) >= 2
    assert all(token not in path.read_text() for path in written)
    assert any("hub_token: '***'" in path.read_text() for path in written)
    with pytest.raises(SystemExit):
        main(["fit", *arguments, *QUIET, "--model.generator=secretive.Fails"])
    output = capsys.readouterr()
    assert token not in output.err + output.out
    assert "no login with hub_token=***" in output.err
    sys.modules.pop("secretive")
