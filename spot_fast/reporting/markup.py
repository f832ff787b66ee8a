"""HTML and SVG from function calls. Text is escaped unless it came out of a call, so no name can become markup."""

from __future__ import annotations

import html
from collections.abc import Iterable

_VOID = frozenset(("br", "col", "hr", "img", "link", "meta"))


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: object, **attributes: object) -> Markup:
    """<name attributes>children</name>.

    A child is text, Markup or a list of children; None and False are left out. An attribute is named as in HTML, with
    a trailing underscore where Python needs one (class_) and others for hyphens; None and False leave it out, True
    gives it no value.
    """
    words = [name]
    for key, value in attributes.items():
        if value is None or value is False:
            continue
        key = key.rstrip("_").replace("_", "-")
        words.append(key if value is True else f'{key}="{escaped(value)}"')
    start = f"<{' '.join(words)}>"
    return Markup(start if name in _VOID else f"{start}{together(children)}</{name}>")


def together(children: Iterable[object]) -> Markup:
    """The children of `tag` alone."""
    parts = []
    for child in children:
        if child is None or child is False:
            continue
        if isinstance(child, (list, tuple)):
            parts.append(together(child))
        else:
            parts.append(child if isinstance(child, Markup) else escaped(child))
    return Markup("".join(parts))


def escaped(value: object) -> str:
    """Text for between tags and for attributes. What no HTML may hold, a lone surrogate or control character of a file
    name, becomes a replacement character."""
    text = "".join("\ufffd" if "\ud800" <= c <= "\udfff" or (c < " " and c not in "\t\n\r") else c for c in str(value))
    return html.escape(text, quote=True)
