"""The generator alone, for programs without this package; or weights for `from_pretrained`."""

import json
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lightning_mmd.commands.models import load_either
from lightning_mmd.latents import as_inputs
from lightning_mmd.module import MMDGAN
from lightning_mmd.passes import evaluating

__all__ = ["export"]

Format = Literal["safetensors", "torch", "onnx", "pretrained"]

_LOADER = '''"""Draw samples of generator.pt2: torch is all that it needs."""

import torch

generator = torch.export.load("generator.pt2").module()
torch.manual_seed({seed})
z = torch.randn(64, {dim})  # latents, any number of rows
samples = generator(z)
torch.save(samples, "samples.pt")
'''


def export(
    ckpt_path: Path | None = None,
    pretrained: str | None = None,
    output: Path = Path("exported"),
    formats: list[Format] | Format = ["safetensors", "torch"],  # noqa: B006 - shown in the help
    store_as: Literal["float16", "bfloat16", "float32", "float64"] | None = None,
    title: str | None = None,
    name: str | None = None,
    licence: str | None = None,
    data: str | None = None,
    recipe: str | None = None,
    report: Path | None = None,
    trust: list[str] | str | None = None,
) -> None:
    """Write the generator alone to a folder, with averaged weights where there are any.

    Args:
        ckpt_path: Checkpoint that ``lightning-mmd fit`` wrote.
        pretrained: In place of a checkpoint, saved weights, see ``lightning-mmd sample``.
        output: The folder; it is made.
        formats: ``safetensors``: the weights alone, ``generator.safetensors``. ``torch``: weights
            and network, ``generator.pt2``, and ``load.py``, which samples it with torch alone.
            ``onnx``: the same as ``generator.onnx``, for other runtimes. ``pretrained``: a folder
            for ``MMDGAN.from_pretrained``, without the critic, and with a model card.
        store_as: Of ``pretrained``: the type that weights are rounded to.
        title: Of the model card; so are the following five.
        name: What ``from_pretrained`` will be given.
        licence: SPDX name.
        data: What it was trained on, and under which licence that is.
        recipe: The command that trained it.
        report: File that ``lightning-mmd evaluate --output`` wrote.
        trust: Modules of your own that the networks come from.
    """
    model = load_either(ckpt_path, pretrained, trust)
    wanted = [formats] if isinstance(formats, str) else list(formats)
    texts = {"title": title, "name": name, "licence": licence, "data": data, "recipe": recipe}
    facts: dict[str, Any] = {key: text for key, text in texts.items() if text is not None}
    if report is not None:
        facts["report"] = json.loads(report.read_text(encoding="utf-8"))
    output.mkdir(parents=True, exist_ok=True)
    average = model.averaged_generator
    generator = model.generator if average is None else average
    for kind in wanted:
        if kind == "pretrained":
            model.save_pretrained(output, for_sampling=True, store_as=store_as, facts=facts)
        elif kind == "safetensors":
            tensors = {n: t.clone().contiguous() for n, t in generator.state_dict().items()}
            (output / "generator.safetensors").write_bytes(save(tensors, {"format": "pt"}))
        elif kind == "torch":
            _export_torch(model, generator, output)
        else:
            _export_onnx(model, generator, output)
    print(f"{', '.join(wanted)}: {output}")


def _inputs(model: MMDGAN) -> tuple[Tensor, ...]:
    return as_inputs(model.fixed_latents(3))


def _rows(inputs: tuple[Tensor, ...]) -> tuple[dict[int, Any], ...]:
    """Say that the number of rows may be any."""
    rows = torch.export.Dim("rows", min=1)
    return tuple({0: rows} for _ in inputs)


def _export_torch(model: MMDGAN, generator: nn.Module, folder: Path) -> None:
    inputs = _inputs(model)
    with evaluating(generator), torch.no_grad():
        program = torch.export.export(generator, inputs, dynamic_shapes=_rows(inputs))
    torch.export.save(program, folder / "generator.pt2")
    if len(inputs) == 1 and model.latents.dim is not None:
        loader = _LOADER.format(seed=0, dim=model.latents.dim)
        (folder / "load.py").write_text(loader, encoding="utf-8")


def _export_onnx(model: MMDGAN, generator: nn.Module, folder: Path) -> None:
    try:
        import onnx  # noqa: F401 # pyright: ignore
        import onnxscript  # noqa: F401 # pyright: ignore
    except ImportError as error:
        raise ImportError(
            "the format onnx needs the packages onnx and onnxscript. Install them: "
            "pip install onnx onnxscript onnxruntime"
        ) from error
    inputs = _inputs(model)
    names = ["latents", *(f"labels_{i}" for i in range(1, len(inputs)))]
    with evaluating(generator), torch.no_grad():
        torch.onnx.export(
            generator,
            inputs,
            folder / "generator.onnx",
            input_names=names,
            output_names=["samples"],
            dynamic_shapes=_rows(inputs),
            dynamo=True,
            external_data=False,
            verbose=False,
        )
