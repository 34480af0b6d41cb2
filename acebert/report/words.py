"""Plain words on what did and did not reproduce, all computed from the intervals."""

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import groupby
from operator import itemgetter

from acebert.evaluation.significance import LEAST_QUERIES, Interval, paired_by_seed
from acebert.evaluation.tables import label
from acebert.report.gains import Comparison, Gain
from acebert.report.partitions_figure import Best

CHAIN = (
    ("FashionBERT-Finetune", "TwinBERT"),
    ("CE-BERT-Finetune", "FashionBERT-Finetune"),
    ("ACE-BERT", "CE-BERT-Finetune"),
)
"""the paper's order of its four systems, upwards"""
IN_FULL = {
    "reproduced": "reproduced: the direction is shown, and the paper's gain lies in the interval",
    "reproduced, larger": "reproduced with a larger gain than the paper's",
    "direction only, smaller": "in the paper's direction, but with a smaller gain",
    "the opposite": "the other way round",
    "not shown": "not shown: the interval includes zero",
    "the other alone is pre-trained: not claimed": "not claimed, for the other row alone is "
    "pre-trained",
    "other numbers of pairs: not claimed": "not claimed, for the clock ended the rows at other "
    "numbers of pairs",
    "one seed: not claimed": "not claimed, for a row was trained with one seed",
    "too few queries": "not claimed, for too few queries count",
}
"""what a verdict on the paper's gain means"""
NOT_UP = {"down": "worse", "open": "not shown"}


def verdict(gain: Gain) -> str:
    """What may be said of it: of the paper's claim where there is one, else of the difference."""
    if told := gain.unclaimed or gain.beside_paper:
        return told
    return {"up": "better", "down": "worse", "open": "no difference shown"}[gain.verdict]


def percent(value: float) -> str:
    return f"{100 * value:+.1f} %"


def bounds(gain: Interval) -> str:
    """`[+0.2, +1.4]`, in percent; `+∞` where the other row may be 0."""
    ends = (gain.low, gain.high)
    low, high = (f"{100 * end:+.1f}".replace("inf", "∞").replace("-∞", "−∞") for end in ends)
    return f"[{low}, {high}]"


def gain_words(gain: Gain) -> str:
    """`GAUC +0.8 % [+0.2, +1.4] (paper +0.6 %)`."""
    paper = "" if gain.paper is None else f" (paper {percent(gain.paper)})"
    return f"{label(gain.metric)} {percent(gain.ours.value)} {bounds(gain.ours)}{paper}"


def count_words(comparisons: Sequence[Comparison]) -> str:
    """What became of the paper's comparisons, counted by verdict."""
    gains = [gain for c in comparisons for gain in c.gains if gain.paper is not None]
    if not gains:
        return ""
    found = Counter(map(verdict, gains))
    told = "; ".join(f"{found[said]} {meaning}" for said, meaning in IN_FULL.items() if found[said])
    return f"The paper's {len(gains)} comparisons of two rows in one metric: {told}."


def order_words(comparisons: Sequence[Comparison], metric: str) -> str:
    """Whether the paper's order of its four systems holds, step by step."""
    steps = {(c.step.row, c.step.beside): c for c in comparisons}
    gains = {}
    for row, beside in CHAIN:
        if (row, beside) not in steps:
            return ""
        found = [g for g in steps[row, beside].gains if g.metric == metric and g.group is None]
        if not found:
            return ""
        gains[row, beside] = found[0]
    name = label(metric)
    if all(gain.verdict == "up" for gain in gains.values()):
        return f"By {name} the four systems stand in the paper's order, every step shown."
    rest = [
        (f"{row} over {beside}", gain.unclaimed or NOT_UP[gain.verdict])
        for (row, beside), gain in gains.items()
        if gain.verdict != "up"
    ]
    return f"By {name} the paper's order is not shown in full ({_by_verdict(rest)})."


def step_words(comparison: Comparison) -> str:
    """One sentence on a step: every metric over all queries."""
    gains = [gain for gain in comparison.gains if gain.group is None]
    told = _by_verdict([(gain_words(gain), verdict(gain)) for gain in gains])
    return f"{comparison.step.row} beside {comparison.step.beside}: {told}."


def _by_verdict(told: Sequence[tuple[str, str]]) -> str:
    """`a, b: better; c: worse`, of what was found and the verdict on it."""
    return "; ".join(
        f"{', '.join(found for found, _ in group)}: {said}"
        for said, group in groupby(told, key=itemgetter(1))
    )


def partitions_words(best: Mapping[str, Best]) -> str:
    """Fig. 5: whether a number of partitions inside the range is best, by metric."""
    told = [f"by {label(metric)} {_optimum_words(one)}" for metric, one in best.items()]
    return f"The paper's best number of partitions lies inside its range; here {'; '.join(told)}."


def _optimum_words(best: Best) -> str:
    where = f"the best n/(P·W), {best.batches_per_partition:.3g},"
    if best.above_ends is None:
        verdict = "one seed: not claimed" if best.seeds < 2 else "none was found inside"
        return f"{where} is an end of the range: {verdict}"
    ends = zip(("easy", "hard"), best.above_ends, strict=True)
    told = " and ".join(
        f"{one.value:+.3f} [{one.low:+.3f}, {one.high:+.3f}] above the {end} end"
        for end, one in ends
    )
    if best.seeds < 2:
        verdict = "one seed: not claimed"
    elif best.queries < LEAST_QUERIES:
        verdict = "too few queries: not claimed"
    else:
        verdict = "shown" if all(one.low > 0 for one in best.above_ends) else "not shown"
    return f"{where} is inside, {told}: {verdict}"


def steps_words(with_adversary: Sequence[int], without: Sequence[int]) -> str:
    """Fig. 6 of trainings that ended by the clock, by seed."""
    a, b = (", ".join(map(str, steps)) for steps in (with_adversary, without))
    return (
        f"Trained by the clock, for {a} steps with the adversary and {b} without: the learning "
        "rate at a step is not the same, so the losses do not compare."
    )


def loss_words(with_adversary: Sequence[float], without: Sequence[float]) -> str:
    """Fig. 6. Losses over the last tenth of the steps, by seed."""
    a, b = (sum(found) / len(found) for found in (with_adversary, without))
    told = f"Over the last tenth of the steps the loss is {a:.3f} with the adversary and "
    told += f"{b:.3f} without; the paper's is lower with it. "
    difference = paired_by_seed(with_adversary, without)
    if difference is None:
        return told + "With one seed nothing may be claimed."
    interval = f"{difference.value:+.3f} [{difference.low:+.3f}, {difference.high:+.3f}]"
    verdict = _verdict(difference, "Reproduced", "The opposite here", "Not shown")
    return f"{told}{verdict}: {interval}."


def probe_words(without: Sequence[float], with_adversary: Sequence[float]) -> str:
    """Fig. 7. Held-out accuracies of the stronger probe, by seed."""
    a, b = (100 * sum(found) / len(found) for found in (without, with_adversary))
    told = f"A fresh probe tells queries from products in {a:.1f} % of held-out vectors without "
    told += f"the adversary and in {b:.1f} % with it (a coin: 50 %). "
    difference = paired_by_seed(with_adversary, without)
    if difference is None:
        return told + "With one seed nothing may be claimed."
    low, high = (f"{100 * bound:+.1f}" for bound in (difference.low, difference.high))
    interval = f"{100 * difference.value:+.1f} points [{low}, {high}]"
    verdict = _verdict(
        difference,
        "The adversary brings the two closer",
        "The adversary drives the two apart",
        "That it brings the two closer is not shown",
    )
    return f"{told}{verdict}: {interval}."


def _verdict(difference: Interval, below: str, above: str, neither: str) -> str:
    """By the side of zero that the whole interval is on."""
    return below if difference.high < 0 else above if difference.low > 0 else neither
