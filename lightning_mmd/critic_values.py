"""Values of a critic: what it must return, and gradients of it that can be differentiated."""

from collections.abc import Callable, Iterable

from torch import Tensor

from lightning_mmd.points import require_tensors

__all__ = ["evaluate_critic", "refuse_once_differentiable"]


def evaluate_critic(critic: Callable[..., Tensor], x: Tensor, *labels: Tensor) -> Tensor:
    """Evaluate a critic and check its output.

    Args:
        critic: Any callable from n samples, and labels where there are any, to n values.
        x: Samples of shape (n, ...).
        *labels: What the critic takes beside them.

    Returns:
        Critic values of shape (n,).

    Raises:
        TypeError: If the samples or the output are not a tensor.
        ValueError: If there is no sample, or the output's shape is neither (n,) nor (n, 1).
    """
    require_tensors("a critic", x=x)
    if len(x) == 0:
        raise ValueError(
            f"a critic needs at least one sample, got an empty batch of shape {tuple(x.shape)}. "
            "Leave such batches out (drop_last=True)."
        )
    values = critic(x, *labels)
    if not isinstance(values, Tensor):
        raise TypeError(
            f"a critic must return a tensor of shape (n,) or (n, 1), got {type(values).__name__}. "
            "Wrap the critic so that it returns its values alone."
        )
    if values.shape not in (x.shape[:1], (len(x), 1)):
        raise ValueError(
            f"a critic must return one value a sample, shape ({len(x)},) or ({len(x)}, 1), got "
            f"{tuple(values.shape)}. Flatten or pool its output, or take the raw score."
        )
    return values.reshape(len(x))


def refuse_once_differentiable(gradients: Iterable[Tensor]) -> None:
    """Refuse gradients that only look differentiable.

    A layer marked ``once_differentiable`` cuts the graph of the reverse pass. ``backward()`` would
    say so, but ``torch.autograd.grad`` passes by on the other routes and leaves a part out.

    Args:
        gradients: Results of a reverse pass with ``create_graph=True``.

    Raises:
        RuntimeError: If one of them hangs on such a layer.
    """
    nodes = {g.grad_fn for g in gradients if g.grad_fn is not None}
    waiting = list(nodes)
    while waiting:
        node = waiting.pop()
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("a layer marked once_differentiable has no second derivative")
        following = {n for n, _ in node.next_functions if n is not None} - nodes
        nodes |= following
        waiting += following
