"""Colours: a label, the group it trains and the removal of that group have one, in light and dark."""

from sgtm.report.palette import DARK, DOMAINS, INK, LIGHT, css, of_label, of_removal, themed

SEVEN = tuple("abcdefg")


def test_label_group_and_removal_of_a_domain_have_its_colour():
    for number, domain in enumerate(SEVEN):
        colour = f"domain-{number % DOMAINS}"
        assert of_label(f"forget:{domain}", SEVEN) == of_label(domain, SEVEN) == of_removal((domain,), SEVEN) == colour
    assert [of_label(label, SEVEN) for label in ("retain", "unlabeled", "forget:h")] == ["retain", *["unlabeled"] * 2]
    assert of_removal(("a", "b"), SEVEN) == INK


def test_light_and_dark_have_the_same_names_and_no_colour_twice():
    assert LIGHT.keys() == DARK.keys() and {f"domain-{n}" for n in range(DOMAINS)} < LIGHT.keys()
    assert len(set(LIGHT.values())) == len(LIGHT) and len(set(DARK.values())) == len(DARK)


def test_a_figure_has_the_pages_variables_for_its_colours():
    assert css({"ink": "#111111", "paper": "#eeeeee"}) == "--ink: #111111; --paper: #eeeeee;"
    assert themed(f'<g fill="{LIGHT["ink"]}" stroke="{LIGHT["domain-2"]}" color="#123456"/>') == (
        '<g fill="var(--ink)" stroke="var(--domain-2)" color="#123456"/>'
    )
