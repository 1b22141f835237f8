"""Networks that take the shape of their images from the data module."""

from typing import Any

from jsonargparse import Namespace
from lightning.pytorch.cli import instantiate_class

__all__ = ["fill_in_shapes"]

_WORD = "data"


def fill_in_shapes(model: Any, data: Any) -> None:
    """Put the data's shape in place of every ``sample_shape: data``.

    Args:
        model: Configuration of the model, which is changed.
        data: That of the data module: ``class_path`` and ``init_args``. The data are not read.

    Raises:
        ValueError: If the data module does not tell its shape, or there is none.
    """
    places = list(_places(model))
    if not places:
        return
    if not data:
        raise ValueError(
            "the model takes sample_shape from the data, but there is no data module. Give --data, "
            "or the shape itself: [channels, height, width]."
        )
    built = {"class_path": data.class_path, "init_args": dict(data.init_args)}
    module = instantiate_class((), built)
    shape = getattr(module, "sample_shape", None)
    if shape is None:
        raise ValueError(
            f"the model takes sample_shape from the data, but {type(module).__name__} has no "
            "attribute sample_shape. Give the networks the shape itself: [channels, height, width]."
        )
    for place in places:
        place["sample_shape"] = list(shape)


def _places(config: Any) -> Any:
    if isinstance(config, (Namespace, dict)):
        values = vars(config) if isinstance(config, Namespace) else config
        if values.get("sample_shape") == _WORD:
            yield config
        for value in list(values.values()):
            yield from _places(value)
    elif isinstance(config, list):
        for value in config:
            yield from _places(value)
