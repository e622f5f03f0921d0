"""
Extension of Griffe: docstrings as Transformers writes them become Markdown. A block such as `Args:` becomes a list,
and [`Schedule`] a link if the site documents it.
"""

import re
from textwrap import dedent

import griffe


BLOCK = re.compile(r"^(Args|Raises|Returns|Example|Examples):\n((?:(?: {4}.*)?\n)*(?: {4}.*)?)", re.M)
ITEM = re.compile(r"^([\w.*]+(?:, [\w.*]+)*)( \(.*\))?:\s+", re.M)
REFERENCE = re.compile(r"\[`(~?)([\w.]+)`\](?![(\[])")


class TransformersDocstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: object) -> None:
        if obj.docstring:
            text = BLOCK.sub(_as_list, obj.docstring.value).replace("```python\n>>>", "```pycon\n>>>")
            obj.docstring.value = REFERENCE.sub(lambda match: _as_link(obj, match[2], bool(match[1])), text)


def _as_list(match: re.Match) -> str:
    items = ITEM.sub(lambda item: f"- {_as_code(item[1])}{item[2] or ''}: ", dedent(match[2]))
    return f"**{match[1]}**\n\n{items}"


def _as_code(names: str) -> str:
    return ", ".join(f"`{name}`" for name in names.split(", "))


def _as_link(obj: griffe.Object, name: str, is_shortened: bool) -> str:
    try:
        path = obj.resolve(name)
    except griffe.NameResolutionError:
        path = name
    shown = name.rpartition(".")[2] if is_shortened else name
    return f'<autoref identifier="{path}" optional><code>{shown}</code></autoref>'
