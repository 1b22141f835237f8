"""Weights that leave a training: a folder of safetensors, configuration and card, and the hub."""

import inspect
import io
import json
import re
import tempfile
from collections.abc import Mapping, Sequence
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor
from typing_extensions import Self

from lightning_mmd.cards import model_card
from lightning_mmd.finite import refuse_to_save
from lightning_mmd.masking import masked
from lightning_mmd.parameters import plain_name

__all__ = ["Pretrained", "packaged", "without_defaults"]

CONFIG, WEIGHTS, CARD = "config.json", "model.safetensors", "README.md"
_HOME = Path(__file__).parent / "weights"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_PARTS = ("generator", "average", "critic")
_COUNTERS = ("critic_step", "images_seen", "cumulative_lr")
_DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float16, torch.float32, torch.float64)}
_DTYPES["bfloat16"] = torch.bfloat16


def packaged() -> list[str]:
    """Return the names of the weights that come with this package."""
    return sorted(path.parent.name for path in _HOME.glob(f"*/{CONFIG}"))


class Pretrained(LightningModule):
    """What of `MMDGAN` saves and loads weights without a checkpoint: for others to use.

    A folder holds ``model.safetensors`` (the networks), ``config.json`` (how they are built, under
    the rules of a checkpoint) and ``README.md`` (the model card). There are no optimizers and no
    state of the rule in it: a training goes on from a checkpoint.
    """

    if TYPE_CHECKING:
        critic_step: int
        images_seen: int
        cumulative_lr: float
        averaged_generator: torch.nn.Module | None
        generator: torch.nn.Module
        _rule_as_given: str

    def save_pretrained(
        self,
        folder: str | Path,
        for_sampling: bool = False,
        store_as: str | None = None,
        facts: Mapping[str, Any] | None = None,
    ) -> Path:
        """Save the networks, how they are built, and a model card.

        Args:
            folder: Where to; it is made.
            for_sampling: Leave the critic out, and save averaged weights, where there are any, as
                the generator's: the smallest file that samples.
            store_as: ``float16``, ``bfloat16``, ``float32`` or ``float64``, what floating-point
                tensors are rounded to in the file; default: as they are.
            facts: For the card, see `model_card`.

        Returns:
            The folder.

        Raises:
            ValueError: If ``store_as`` is none of these, or an argument of the model is no plain
                data.
            DivergedError: If a weight is not finite.
        """
        if store_as is not None and store_as not in _DTYPES:
            raise ValueError(f"store_as must be one of {', '.join(_DTYPES)}, got {store_as!r}.")
        refuse_to_save(self, None)
        tensors = self._weights(for_sampling)
        if store_as is not None:
            wanted = _DTYPES[store_as]
            tensors = {n: t.to(wanted) if t.is_floating_point() else t for n, t in tensors.items()}
        config = self._config(tensors, for_sampling, store_as)
        try:
            text = json.dumps(config, indent=1, sort_keys=True)
        except TypeError as error:
            raise ValueError(
                f"an argument of the model is no plain data ({error}), so {CONFIG} cannot say how "
                "it is built. Give plain numbers and texts, or build it by the command line."
            ) from error
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / WEIGHTS).write_bytes(save(tensors, {"format": "pt"}))
        (folder / CONFIG).write_text(text + "\n", encoding="utf-8")
        (folder / CARD).write_text(model_card(config, masked(dict(facts or {}))), encoding="utf-8")
        return folder

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path,
        map_location: Any = "cpu",
        trust: Sequence[str] = (),
        revision: str | None = None,
        token: str | None = None,
        endpoint: str | None = None,
        **kwargs: Any,
    ) -> Self:
        """Build a model from weights of this package, of a folder, or of the Hugging Face hub.

        What ``config.json`` names is checked as a checkpoint's is, before anything is built.

        Args:
            name: A name of `packaged` (``digits``, ``mnist``); else a folder, if there is one; else
                ``owner/name`` on the hub.
            map_location: Device to load to.
            trust: Names of further modules whose classes and functions ``config.json`` may name.
            revision: Branch, tag or commit on the hub.
            token: For a private repository; default: that of ``hf auth login``.
            endpoint: Address of another hub.
            kwargs: Arguments of the class, in place of the file's. Networks and the rule of a model
                that was made in Python are given so: ``generator=..., critic=..., rule=...``.

        Returns:
            The model, which samples with averaged weights where there are any. Where the file has
            no critic, the model has a fresh one.

        Raises:
            FileNotFoundError: If there are no such weights.
            ValueError: If a file is damaged, or the model was made in Python and ``kwargs`` do not
                say of what.
            UntrustedError: If ``config.json`` asks for what it may not ask for.
            ImportError: If they are on the hub, and huggingface_hub is missing.
        """
        folder = _find(name, revision, token, endpoint)
        checkpoint = _checkpoint(folder)
        file = io.BytesIO()
        torch.save(checkpoint, file)
        file.seek(0)
        needed = {"generator", "critic"} - kwargs.keys() - checkpoint["hyper_parameters"].keys()
        if needed:
            raise ValueError(
                f"{folder / CONFIG} does not say how {' and '.join(sorted(needed))} are built, "
                "because they were made in Python. Give them: "
                f"{cls.__name__}.from_pretrained(name, generator=..., critic=...)."
            )
        model: Any = cls.load_from_checkpoint(
            file,  # pyright: ignore[reportArgumentType]
            map_location,
            trust=trust,  # pyright: ignore[reportCallIssue]
            **kwargs,
        )
        return model.eval()

    def push_to_hub(
        self,
        name: str,
        private: bool = False,
        token: str | None = None,
        endpoint: str | None = None,
        message: str = "Weights of an MMD GAN",
        **saving: Any,
    ) -> str:
        """Save to a temporary folder and upload it to a repository of the Hugging Face hub.

        Args:
            name: ``owner/name``; the repository is made if there is none.
            private: Whether a new repository is private.
            token: Default: that of ``hf auth login``.
            endpoint: Address of another hub.
            message: Of the commit.
            saving: Arguments of `save_pretrained`.

        Returns:
            The commit's address.

        Raises:
            ImportError: If huggingface_hub is missing.
            ValueError: If the name is none.
        """
        hub = _hub()
        if not _HUB_ID.fullmatch(name):
            raise ValueError(f"a repository of the hub is named owner/name, got {name!r}.")
        facts = {"name": name} | dict(saving.pop("facts", None) or {})
        api = hub.HfApi(endpoint=endpoint, token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, facts=facts, **saving)
            api.create_repo(name, private=private, exist_ok=True)
            found = api.upload_folder(repo_id=name, folder_path=folder, commit_message=message)
        return str(found.commit_url)

    def _weights(self, for_sampling: bool) -> dict[str, Tensor]:
        """Return the tensors to save, under the names that they have uncompiled."""
        own = {plain_name(n): t.detach().cpu() for n, t in self.state_dict().items()}
        average = self.averaged_generator
        averaged = {} if average is None else average.state_dict()
        averaged = {plain_name(n): t.detach().cpu() for n, t in averaged.items()}
        if for_sampling:
            own = {n: t for n, t in own.items() if not n.startswith("critic.")}
            own |= {f"generator.{n}": t for n, t in averaged.items()}
        else:
            own |= {f"average.{n}": t for n, t in averaged.items()}
        return {n: t.clone().contiguous() for n, t in own.items()}  # what is shared is stored twice

    def _config(
        self, tensors: Mapping[str, Tensor], for_sampling: bool, store_as: str | None
    ) -> dict[str, Any]:
        dtype = next(p.dtype for p in self.generator.parameters() if p.is_floating_point())
        return {
            "library": "lightning-mmd",
            "version": metadata.version("lightning-mmd"),
            "parts": [p for p in _PARTS if any(n.startswith(f"{p}.") for n in tensors)],
            "sampling_only": for_sampling,
            "averaged": self.averaged_generator is not None,
            "stored_as": store_as or str(dtype).removeprefix("torch."),
            "rule": self._rule_as_given,
            **{name: getattr(self, name) for name in _COUNTERS},
            "hyper_parameters": masked(without_defaults(_plain(self.hparams))),
        }


def _plain(value: Any) -> Any:
    """Return dictionaries and lists in place of Lightning's and jsonargparse's own."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    return value


def _checkpoint(folder: Path) -> dict[str, Any]:
    """Read a folder as the checkpoint that it would be."""
    for file in (CONFIG, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{folder} has no {file}. Give a folder that save_pretrained wrote."
            )
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        known = {name: config[name] for name in _COUNTERS}
        rule, arguments = config["rule"], dict(config["hyper_parameters"])
        sampling_only = bool(config["sampling_only"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{folder / CONFIG} is not one that save_pretrained writes ({error!r}). Take the whole "
            "folder that it wrote."
        ) from error
    try:
        tensors = load_file(folder / WEIGHTS)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{folder / WEIGHTS} is cut off or damaged: {error}.") from error
    if any(bool(t.isnan().any()) for t in tensors.values()):
        raise ValueError(
            f"{folder / WEIGHTS} holds values that are no numbers (NaN). Do not use it."
        )
    average = {n.removeprefix("average."): t for n, t in tensors.items() if n[:8] == "average."}
    own = {n: t for n, t in tensors.items() if n[:8] != "average."}
    return {
        "pytorch-lightning_version": metadata.version("lightning"),
        "state_dict": own,
        "hyper_parameters": arguments,
        "mmdgan": {
            **known,
            "generator_metrics": {},
            "rule": rule,
            "pretrained": {"without_critic": sampling_only},
            **({"average": average} if average else {}),
        },
    }


def _find(name: str | Path, revision: str | None, token: str | None, endpoint: str | None) -> Path:
    """Return the folder of some weights, after a download if need be."""
    if str(name) in packaged():
        return _HOME / str(name)
    if Path(name).is_dir():
        return Path(name)
    if not _HUB_ID.fullmatch(str(name)):
        raise FileNotFoundError(
            f"there are no weights named {str(name)!r}. This package has "
            f"{' and '.join(packaged())}; or give a folder that save_pretrained wrote, or "
            "owner/name on the Hugging Face hub."
        )
    hub = _hub()
    try:
        return Path(
            hub.snapshot_download(
                str(name),
                revision=revision,
                token=token,
                endpoint=endpoint,
                allow_patterns=[CONFIG, WEIGHTS, CARD],
            )
        )
    except (OSError, ValueError, hub.errors.HfHubHTTPError) as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor to be had from the Hugging Face hub: {error}. Check "
            "the name, the network, and 'hf auth login' where it is private."
        ) from error


def _hub() -> Any:
    try:
        import huggingface_hub
        import huggingface_hub.errors
    except ImportError as error:
        raise ImportError(
            "the Hugging Face hub needs the package huggingface_hub. Install it: "
            "pip install huggingface_hub"
        ) from error
    return huggingface_hub


def without_defaults(config: Any) -> Any:
    """Leave out arguments of torch's classes that are their defaults.

    A later torch adds arguments, with defaults that an earlier one does not know: what is saved
    with the one is then built by the other.

    Args:
        config: Plain data; classes are ``{"class_path": ..., "init_args": {...}}``.
    """
    if isinstance(config, list):
        return [without_defaults(value) for value in config]
    if not isinstance(config, dict):
        return config
    kept = {name: without_defaults(value) for name, value in config.items()}
    path, arguments = kept.get("class_path"), kept.get("init_args")
    if isinstance(path, str) and path.startswith("torch.") and isinstance(arguments, dict):
        module, _, name = path.rpartition(".")
        parameters = inspect.signature(getattr(import_module(module), name)).parameters
        usual = {n: p.default for n, p in parameters.items()}
        usual = {n: list(d) if isinstance(d, tuple) else d for n, d in usual.items()}
        kept["init_args"] = {n: v for n, v in arguments.items() if n not in usual or usual[n] != v}
    return kept
