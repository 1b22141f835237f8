"""Secrets out of what is written: configurations, loggers and error messages."""

import re
from typing import Any

__all__ = ["MASK", "mask", "masked"]

MASK = "***"

_NAME = r"\w*(?:token|api_?key|secret|passw(?:or)?d|passphrase|credential|access_?key)s?"
_ASSIGNED = re.compile(
    rf"""(?<![A-Za-z0-9])({_NAME}["']?\s*[:=]\s*["']?)(?!null\b|None\b|\*{{3}})[^\s"',}}\]]+""",
    re.IGNORECASE,
)
_TOKENS = re.compile(
    r"""\b(?:
        [0-9a-f]{40} | wandb_v\d_\w{20,} | hf_\w{20,} | gh[pousr]_\w{20,} | github_pat_\w{20,}
        | glpat-[\w-]{20,} | sk-[\w-]{20,} | xox[abprs]-[\w-]{10,} | AKIA[0-9A-Z]{16}
        | eyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]+
    )\b""",
    re.VERBOSE,
)
_IN_URL = re.compile(r"(?<=://)([^\s/:@]*):([^\s/@]+)@")
_SECRET_NAME = re.compile(rf"{_NAME}$", re.IGNORECASE)


def mask(text: str) -> str:
    """Replace what looks like a secret by ``***``.

    That is the value of a name such as ``token``, ``api_key`` or ``password``, a password in a
    URL, and what has the form of a token of W&B, Hugging Face, GitHub, GitLab, OpenAI, Slack or
    AWS, or of a JSON web token.

    Args:
        text: Any text.

    Examples:
        >>> mask("token: abc, user: me, https://me:secret@host/x")
        'token: ***, user: me, https://me:***@host/x'
    """
    text = _IN_URL.sub(rf"\1:{MASK}@", text)
    return _TOKENS.sub(MASK, _ASSIGNED.sub(rf"\1{MASK}", text))


def masked(value: Any, name: str = "") -> Any:
    """Return a copy of nested data whose secrets are masked; what is no data stays what it is.

    Args:
        value: Dictionaries (and what has their ``items``), lists and tuples of anything.
        name: The name that it has; a text of a secret name is masked whatever it looks like.

    Examples:
        >>> masked({"token": "abc", "nested": [{"path": "x"}], "tokens": 3})
        {'token': '***', 'nested': [{'path': 'x'}], 'tokens': 3}
    """
    if isinstance(value, str):
        return MASK if value and _SECRET_NAME.match(name) else mask(value)
    if isinstance(value, dict):
        return {key: masked(part, str(key)) for key, part in value.items()}
    if hasattr(value, "clone") and hasattr(value, "keys") and hasattr(value, "__setitem__"):
        copy = value.clone()  # a Namespace of jsonargparse, whose class stays
        for key in vars(copy):
            setattr(copy, key, masked(getattr(copy, key), key))
        return copy
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(masked(part, name) for part in value)
    return value
