"""The page: a jinja2 template filled in; titles and names are escaped by it."""

from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from acebert.evaluation.significance import Interval
from acebert.evaluation.tables import label
from acebert.report import words
from acebert.report.gains import Gain
from acebert.report.style import colour

STATES = {
    **dict.fromkeys(("reproduced", "reproduced, larger", "better"), "yes"),
    **dict.fromkeys(("the opposite", "worse"), "no"),
}


def render(context: dict[str, Any]) -> str:
    """The page as HTML; `context` is made by `acebert.report.report`."""
    environment = Environment(
        loader=PackageLoader("acebert.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "label": label,
        "percent": words.percent,
        "bounds": words.bounds,
        "verdict": words.verdict,
        "colour": colour,
        "half": half,
        "state": state,
        "duration": duration,
        "group": lambda group: "all queries" if group is None else f"{group} queries",
    }
    return environment.get_template("page.html.j2").render(context)


def state(gain: Gain) -> str:
    """`yes`, `no` or `open`: the colour of a verdict."""
    return STATES.get(words.verdict(gain), "open")


def half(interval: Interval) -> str:
    """Half of the interval, which is nearly symmetric."""
    return f"±{(interval.high - interval.low) / 2:.3f}"


def duration(seconds: float) -> str:
    """`48 s`, `6.5 min`, `2.1 h`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
