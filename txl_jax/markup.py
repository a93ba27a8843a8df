"""HTML from elements, so that no text can become anything but text."""

from collections.abc import Iterable, Sequence
from xml.etree.ElementTree import Element, tostring

Content = Element | str


def element(tag: str, *content: Content, **attributes: str) -> Element:
    """An element that holds texts and other elements.

    A name of an attribute may end in `_` where Python has the word for itself, as `class_`.
    """
    made = Element(tag, {name.rstrip("_"): value for name, value in attributes.items()})
    for part in content:
        if isinstance(part, Element):
            made.append(part)
        elif len(made):
            made[-1].tail = (made[-1].tail or "") + part
        else:
            made.text = (made.text or "") + part
    return made


def table(head: Sequence[str], rows: Iterable[Sequence[Content]], numbers: int = 0) -> Element:
    """A table that scrolls within itself; its last `numbers` columns are numbers."""
    first_number = len(head) - numbers

    def row(tag: str, cells: Sequence[Content]) -> Element:
        return element(
            "tr",
            *(
                element(tag, cell, **({"class_": "number"} if place >= first_number else {}))
                for place, cell in enumerate(cells)
            ),
        )

    body = element("tbody", *(row("td", cells) for cells in rows))
    made = element("table", element("thead", row("th", head)), body)
    # What scrolls has to be reached by keys too.
    return element("div", made, class_="table", tabindex="0")


def document(title: str, style: str, content: Iterable[Element]) -> bytes:
    """A page in one file, which a browser lets load nothing and run nothing."""
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    page = element(
        "html",
        element(
            "head",
            element("meta", charset="utf-8"),
            element("meta", **{"http-equiv": "Content-Security-Policy"}, content=policy),
            element("meta", name="viewport", content="width=device-width, initial-scale=1"),
            element("title", title),
            element("style", style),
        ),
        element("body", element("main", *content)),
        lang="en",
    )
    text = "<!doctype html>\n" + tostring(page, encoding="unicode", method="html") + "\n"
    return text.encode("utf-8", "replace")  # UTF-8 holds no lone surrogates
