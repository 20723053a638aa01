"""HTML of elements whose text is always escaped: text that is no `Html` cannot become an element."""

from __future__ import annotations

import html

VOID = {"meta", "wbr", "rect", "line", "path"}  # elements without an end tag, those of SVG as ``<rect/>``


class Html(str):
    """Text that is HTML already."""

    __slots__ = ()


def tag(name: str, *children: str, **attributes: str | float | bool) -> Html:
    """An element.

    Args:
        name: the element's.
        *children: `Html`, or other text, which is escaped.
        **attributes: escaped; "_" stands for "-", and one at the end is dropped, as in ``class_``. True is an attribute
            without a value; False leaves it out.
    """
    own = "".join(_attribute(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    if name in VOID:
        return Html(f"<{name}{own}/>")
    return Html(f"<{name}{own}>{joined(*children)}</{name}>")


def joined(*parts: str) -> Html:
    """Parts one after the other; what is no `Html` is escaped."""
    return Html("".join(part if isinstance(part, Html) else html.escape(part) for part in parts))


def breakable(name: str) -> Html:
    """A name that may be broken after an underscore, before it is anywhere else."""
    first, *rest = name.split("_")
    return joined(first, *(part for each in rest for part in ("_", tag("wbr"), each)))


def _attribute(name: str, value: str | float | bool) -> str:
    if value is False:
        return ""
    return f" {name}" if value is True else f' {name}="{html.escape(str(value))}"'
