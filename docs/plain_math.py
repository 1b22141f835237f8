"""Formulas of docstrings, which are reStructuredText, as text that needs no script to be shown."""

import re
import textwrap

import griffe


def plain(text: str) -> str:
    """Return a docstring with its formulas and references as literal text."""

    def block(match: re.Match[str]) -> str:
        indent = match[1]
        lines = textwrap.dedent(match[2] + "\n" + match[3] if match[2] else match[3]).strip()
        fenced = ["```text", *lines.splitlines(), "```"]
        return "\n".join(indent + line for line in fenced) + "\n"

    text = re.sub(
        r"^([ ]*)\.\. math::([^\n]*)\n((?:\1[ ]+[^\n]*\n|[ ]*\n(?=\1[ ]{2,}))*)",
        block,
        text + "\n",
        flags=re.MULTILINE,
    )
    text = re.sub(r":math:`([^`]+)`", r"`\1`", text)
    return re.sub(
        r":(?:class|func|meth|mod|attr):`~?(?:[\w.]+\.)?([\w.]+)`", r"`\1`", text
    ).rstrip()


class PlainMath(griffe.Extension):
    """Applies `plain` to every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        """Rewrite the object's docstring."""
        if obj.docstring is not None:
            obj.docstring.value = plain(obj.docstring.value)
