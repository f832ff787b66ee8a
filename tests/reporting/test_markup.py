"""Markup from calls: what is text stays text."""

from html.parser import HTMLParser

from spot_fast.reporting.markup import Markup, tag, together


def test_text_and_attributes_cannot_become_markup():
    evil = "</td><script>\"'&"
    made = tag("td", evil, title=evil)
    seen = []

    class Parser(HTMLParser):
        def handle_starttag(self, name, attributes):
            seen.append((name, dict(attributes)))

        def handle_data(self, data):
            seen.append(data)

    Parser().feed(made)
    assert seen == [("td", {"title": evil}), evil]


def test_what_no_page_can_hold_is_replaced():
    made = tag("p", "a\x00b\x1bc\udcffd\te")
    assert made == "<p>a\ufffdb\ufffdc\ufffdd\te</p>"
    made.encode("utf-8")


def test_children_attributes_and_void_elements():
    assert tag("ul", [tag("li", 1), None, False, ("x", Markup("<b>y</b>"))], class_="a", data_x=0) == (
        '<ul class="a" data-x="0"><li>1</li>x<b>y</b></ul>'
    )
    assert tag("img", alt="", hidden=True, id=None, draggable=False) == '<img alt="" hidden>'
    assert tag("meta", name="viewport") == '<meta name="viewport">'
    assert together(["<", Markup("<br>")]) == "&lt;<br>"
