"""Which measure without labels goes with what is forgotten, over the runs of several streams: label_free.py RESULTS.JSON ...

Writes two Markdown tables. The first: Spearman's rank correlation of each measure with the forgetting of earlier periods, over every
version and every period that an earlier one learned; by stream (kNN), over all streams, and over all within a method, where the mean of
the method's pairs on the stream is subtracted from both sides first (what is left is how runs of one method, and their periods, differ).
The second: neighbour retention from the version before, by what was lost since then, and how much of it lies below a limit. Initial
weights and versions that began anew (`joint`) have nothing to be compared with and are left out, as in each stream's report.
"""

import json
import math
import pathlib
import sys

PROBES = {"linear": "linear", "kNN": "knn", "10-shot": "few_shot"}
# Larger is expected with more forgetting; of the newest scores and those of the version that learned the period.
MEASURES = {
    "1 - neighbour retention": lambda new, old: 1 - new["drift"].get("neighbour_retention", math.nan),
    "1 - neighbour overlap": lambda new, old: 1 - new["drift"]["neighbour_overlap"],
    "1 - CKA": lambda new, old: 1 - new["drift"]["cka"],
    "1 - recoverability": lambda new, old: 1 - new["drift"]["recoverability"],
    "rise of the contrastive loss": lambda new, old: new["contrastive_loss"] - old["contrastive_loss"],
    "rise of alignment": lambda new, old: new["alignment"] - old["alignment"],
    "rise of uniformity": lambda new, old: new["uniformity"] - old["uniformity"],
    "fall of the effective rank": lambda new, old: old["effective_rank"] - new["effective_rank"],
}
LIMITS = [0.5, 0.6, 0.7, 0.8, 0.85, 0.9, 0.95]
# Where classes of what was lost by kNN begin, in points.
LOST = {"more than 5": 5, "3 to 5": 3, "1 to 3": 1, "less than 1": -math.inf}


def ranks(values):
    """Equal values share their mean rank."""
    order = sorted(values)
    first, last = {}, {}
    for place, value in enumerate(order):
        first.setdefault(value, place)
        last[value] = place
    return [(first[value] + last[value]) / 2 for value in values]


def correlation(pairs):
    pairs = [pair for pair in pairs if not math.isnan(pair[0])]
    x, y = (ranks([pair[side] for pair in pairs]) for side in (0, 1))
    middle = (len(pairs) - 1) / 2
    product = lambda a, b: sum((i - middle) * (j - middle) for i, j in zip(a, b))
    scale = math.sqrt(product(x, x) * product(y, y))
    return f"{product(x, y) / scale:.2f}" if scale else "-"


def within(groups):
    """The groups' pairs, less each group's means."""
    centred = []
    for pairs in groups:
        pairs = [pair for pair in pairs if not math.isnan(pair[0])]
        means = [sum(pair[side] for pair in pairs) / max(len(pairs), 1) for side in (0, 1)]
        centred += [(x - means[0], y - means[1]) for x, y in pairs]
    return centred


def sequences(results):
    """The method and each version's scores by period, of every run that learned period by period."""
    for run in results["runs"]:
        versions = [{scores["period"]: scores for scores in version["scores"]} for version in run["versions"]]
        if run["method"] != "joint" and len(versions) > 1:
            yield run["method"], versions


def drifts(results):
    """(method, measures, forgetting by each probe) of every version on every period that an earlier one learned."""
    for method, versions in sequences(results):
        for number, version in enumerate(versions):
            for period, new in version.items():
                earlier = [before[period] for before in versions[:number] if period in before]
                if earlier:
                    lost = {name: max(one[key] for one in earlier) - new[key] for name, key in PROBES.items()}
                    yield method, {name: of(new, earlier[0]) for name, of in MEASURES.items()}, lost


def steps(results):
    """(neighbour retention from the version before, points of kNN lost since) of every version on every earlier period."""
    for _, versions in sequences(results):
        for before, version in zip(versions, versions[1:]):
            for period, old in before.items():
                # The version before learned the period where it has no drift of its own there.
                drift = version[period].get("parent_drift") if old["drift"] else version[period]["drift"]
                if drift and "neighbour_retention" in drift:
                    yield drift["neighbour_retention"], 100 * (old["knn"] - version[period]["knn"])


def row(*cells):
    print("|", " | ".join(str(cell) for cell in cells), "|")


def main(paths):
    streams = {path.parent.name: json.loads(path.read_text()) for path in map(pathlib.Path, paths)}
    found = {name: list(drifts(results)) for name, results in streams.items()}
    everything = [pair for pairs in found.values() for pair in pairs]
    row("measure", *(f"{name}, kNN" for name in streams), *(f"all, {probe}" for probe in PROBES), *(f"within a method, {probe}" for probe in PROBES))
    row("---", *["--:"] * (len(streams) + 2 * len(PROBES)))
    for measure in MEASURES:
        pairs = lambda rows, probe: [(measures[measure], lost[probe]) for _, measures, lost in rows]
        by_method = [
            [one for one in rows if one[0] == method] for rows in found.values() for method in {one[0] for one in rows}
        ]
        row(
            measure,
            *(correlation(pairs(rows, "kNN")) for rows in found.values()),
            *(correlation(pairs(everything, probe)) for probe in PROBES),
            *(correlation(within([pairs(rows, probe) for rows in by_method])) for probe in PROBES),
        )
    row("pairs", *(len(rows) for rows in found.values()), *[len(everything)] * 2 * len(PROBES))
    print()
    row("lost by kNN, points", "pairs", "mean retention", *(f"below {limit}" for limit in LIMITS))
    row("---", *["--:"] * (len(LIMITS) + 2))
    pairs, most = [pair for results in streams.values() for pair in steps(results)], math.inf
    for name, least in LOST.items():
        retained = [retention for retention, lost in pairs if least <= lost < most]
        mean = f"{sum(retained) / len(retained):.3f}" if retained else "-"
        row(name, len(retained), mean, *(sum(retention < limit for retention in retained) for limit in LIMITS))
        most = least
    print()


if __name__ == "__main__":
    main(sys.argv[1:])
