"""Elements of HTML and SVG. Text and attribute values are escaped by the serializer, so that nothing a run says (a
model's name, a description, a path) can become markup."""

import re
from xml.etree.ElementTree import Element, tostring

Child = Element | str | None

# Characters that HTML forbids: controls, and halves of surrogate pairs, which no encoding can write.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")


def element(tag: str, *children: Child, **attributes: object) -> Element:
    """`element("p", "some ", element("b", "text"), class_="note")`. A trailing or inner underscore of an attribute's
    name stands for nothing or for a hyphen; None leaves a child or an attribute out."""
    made = Element(tag)
    for name, value in attributes.items():
        if value is not None:
            made.set(name.rstrip("_").replace("_", "-"), plain(str(value)))
    last: Element | None = None
    for child in children:
        if isinstance(child, Element):
            made.append(child)
            last = child
        elif child is not None and last is None:
            made.text = (made.text or "") + plain(child)
        elif child is not None and last is not None:
            last.tail = (last.tail or "") + plain(child)
    return made


def plain(text: str) -> str:
    """The text without characters that HTML cannot hold."""
    return _FORBIDDEN.sub("\N{REPLACEMENT CHARACTER}", text)


def picture(title: str, style: str, width: float, height: float, *body: Child) -> str:
    """A whole SVG file, in pixels. style: as in `document`."""
    sheet = Element("style")
    sheet.text = style
    wide, high = f"{width:.0f}", f"{height:.0f}"
    size = {"viewBox": f"0 0 {wide} {high}", "width": wide, "height": high}
    made = element("svg", element("title", title), sheet, *body, xmlns="http://www.w3.org/2000/svg", role="img", **size)
    return tostring(made, encoding="unicode") + "\n"


def document(title: str, style: str, *body: Child) -> str:
    """A whole page. style: trusted CSS, the only text that is not escaped. The page may load and run nothing."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content="default-src 'none'; style-src 'unsafe-inline'"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
    )
    sheet = Element("style")
    sheet.text = style
    head.append(sheet)
    page = element("html", head, element("body", *body), lang="en")
    return "<!DOCTYPE html>\n" + tostring(page, encoding="unicode", method="html") + "\n"
