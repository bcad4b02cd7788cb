"""Tables of one evaluation and of several, and charts of trainings.

    python -m common.report runs/eval_text runs/eval_latent ...   # several runs side by side

The pages to look at are common/page.py's.
"""

import json
import os
import sys
from collections import Counter

import numpy as np

from common.benchmarks import PAPER
from common.cli import errors_in_one_line
from common.clips import key_frame_positions, read_clip
from common.formats import Frame, Row
from common.intervals import paired_bootstrap
from common.judge import add_verdicts
from common.runs import read_log
from common.walk import read_book


def paper_rows(summary):
    """summary.json's content -> (columns, rows of text): ours, then what the paper published.

    ([], []) if it published nothing on this benchmark. FutureBench is in percent, ours by official
    letters: the paper's way to count. Source: ours.
    """
    benchmark, scores = summary["benchmark"], summary["scores"]
    if benchmark not in PAPER:
        return [], []
    columns, published = PAPER[benchmark]
    if benchmark == "twiffbench":
        mine = [f"{scores['all'][c]:.2f}" if scores["all"]["n"] else "-" for c in columns]
    else:
        mine = [
            f"{100 * scores[c]['official']:.1f}" if scores.get(c, {}).get("n") else "-"
            for c in columns[:-2]
        ]
        mine += [f"{scores['all']['tokens']:.1f}", f"{summary['seconds']['all']:.2f}"]
    return ["", *columns], [
        [f"ours, {summary['found']} of {summary['total']} found", *mine],
        *([f"paper's: {name}", *values] for name, values in published.items()),
    ]


def used(summary):
    """What our row was made with, as a line beside the paper's. Source: ours."""
    video, image = summary["pixels"]["video"][1], summary["pixels"]["image"][1]
    return (
        f"ours: {summary['frames']} frames a video at most, {video:,} pixels a video, "
        f"{image:,} pixels a picture"
    )


def as_text(head, rows):
    """A table as text: the first column to the left, the others to the right. Source: ours."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    wide = [max(len(row[i]) for row in rows if i < len(row)) for i in range(len(head))]
    return "\n".join(
        "  ".join(f"{cell:{'>' if i else '<'}{wide[i]}}" for i, cell in enumerate(row))
        for row in rows
    )


def read_summary(folder):
    """An evaluation's summary.json. Raises SystemExit if there is none."""
    path = os.path.join(folder, "summary.json")
    if not os.path.exists(path):
        raise SystemExit(f"{path}: no such file (evaluate.py writes it at its end)")
    with open(path) as f:
        return json.load(f)


def scored_lines(folder):
    """An evaluation's result lines that have a score -> {id: line}, with `score` in each.

    The score is 0 or 1 for options, the average of the judge's two for TwiFF-Bench. Source: ours.
    """
    lines, scored = read_book(folder, "samples"), {}
    add_verdicts(folder, lines.values())
    for id, line in lines.items():
        if "right" in line:
            scored[id] = dict(line, score=float(line["right"]))
        elif "judged" in line:
            scored[id] = dict(line, score=line["judged"]["average"])
    return scored


def compare(folders):
    """Several evaluations -> their scores by group with intervals, as a markdown table. Ours.

    Below it, each run against the first. Raises SystemExit for a folder without an evaluation.
    """
    summaries = [read_summary(folder) for folder in folders]
    groups = list(summaries[0]["scores"])
    head = "| | latents | " + " | ".join(groups) + " | found |"
    lines = [head, "|---" * (len(groups) + 3) + "|"]
    for folder, summary in zip(folders, summaries):
        cells = [folder, summary["latents"]]
        for group in groups:
            scores = summary["scores"].get(group)
            cells.append(_score(scores) if scores else "")
        cells.append(f"{summary['found']}/{summary['total']}")
        lines.append("| " + " | ".join(cells) + " |")
    if len(folders) > 1:
        lines += ["", *differences(folders, groups, summaries[0]["average"])]
    return "\n".join(lines)


def _score(scores):
    """A group's score with its interval, as text."""
    low, high = scores["bootstrap"]
    value = scores["accuracy"] if "accuracy" in scores else scores["average"]
    return f"{value:.3f} ({low:.3f} - {high:.3f})"


def differences(folders, groups, average):
    """Each run minus the first, over the questions that both have a score for -> markdown lines.

    average: how the groups make "all", micro | macro. A difference whose interval leaves out 0 is
    marked. Raises SystemExit if two runs have no question in common, or another one by the same
    id. Source: ours.
    """
    first = scored_lines(folders[0])
    lines = [
        f"Minus {folders[0]}, over the questions both answered; 95 % intervals of the paired",
        "difference, clips drawn whole; * = it leaves out 0",
        "",
        "| | " + " | ".join(groups) + " | questions |",
        "|---" * (len(groups) + 2) + "|",
    ]
    for folder in folders[1:]:
        pairs = pair(first, scored_lines(folder), folders[0], folder)
        cells = [folder]
        for group in groups:
            some = [(a, b) for a, b in pairs if group in (a["group"], "all")]
            macro = group == "all" and average == "macro"
            cells.append(_difference(some, macro) if some else "")
        lines.append("| " + " | ".join([*cells, str(len(pairs))]) + " |")
    return lines


def pair(a, b, name, other):
    """Two runs' {id: line} -> [(line, line)] of the same questions. Raises SystemExit."""
    pairs = [(a[id], b[id]) for id in a if id in b]
    if not pairs:
        raise SystemExit(f"{name} and {other} have no scored question in common")
    for one, two in pairs:
        for key in ("group", "gold", "prompt"):
            if one.get(key) != two.get(key):
                raise SystemExit(
                    f"{name} and {other}: {one['id']!r} is not the same question, its {key} is "
                    f"{one.get(key)!r} and {two.get(key)!r}"
                )
    return pairs


def _difference(pairs, macro):
    """The mean difference of paired lines with its interval, as text."""
    gain, (low, high) = paired_bootstrap(
        [a["score"] for a, _ in pairs],
        [b["score"] for _, b in pairs],
        [str(a.get("clip", a["id"])) for a, _ in pairs],
        groups=[a["group"] for a, _ in pairs] if macro else None,
    )
    text = f"{gain:+.3f} ({low:+.3f} to {high:+.3f})"
    return text + " *" * (low > 0 or high < 0)


def score_rows(scores):
    """{group: scores} -> (head, rows of text) with every column the table and the report show.

    Source: ours.
    """
    judged = "chain" in next(iter(scores.values()))
    main = ["chain", "answer", "average"] if judged else ["accuracy"]
    readings = [k for k in ("strict", "official") if any(k in s for s in scores.values())]
    counts = ["unparsed"]
    if judged:
        counts.append("failed")
    elif "official" in readings:
        counts.append("official_unparsed")
    counts.append("skipped")
    names = [name.replace("_", " ") for name in counts]
    head = ["group", "n", *main, "95% interval", *readings, *names, "spans", "latents", "tokens"]

    rows = []
    for group, s in scores.items():
        row = [group, s["n"], *(f"{s[k]:.3f}" if s["n"] else "-" for k in main)]
        row.append("{:.3f} - {:.3f}".format(*s["bootstrap"]) if s["n"] else "-")
        row += [f"{s[k]:.3f}" if k in s else "" for k in readings]
        row += [s.get(k, "") for k in counts]
        rows.append([*row, f"{s['spans']:.2f}", f"{s['latents']:.2f}", f"{s['tokens']:.1f}"])
    return head, rows


def draw_bars(results, names, groups, png):
    """[{training: {group: scores}} a seed] -> accuracy by group as bars, a dot a seed.

    The grey line is chance among four options. Source: ours.
    """
    fig, ax = _axes(1, 9, 3.4)
    groups, n = [*groups, "all"], len(results[0])
    for i, name in enumerate(results[0]):
        values = []
        for seed in results:
            values.append([seed[name][group]["accuracy"] for group in groups])
        values = np.array(values)  # (seeds, groups)
        at = np.arange(len(groups)) + (i - (n - 1) / 2) * 0.8 / n
        ax.bar(at, values.mean(0), 0.8 / n, label=names.get(name, name))
        ax.plot(np.repeat(at[None], len(values), 0), values, "k.", ms=3)
    ax.set(xticks=range(len(groups)), xticklabels=[*groups[:-1], "avg"])
    ax.set(ylabel="accuracy", ylim=(0, 1.02))
    ax.axhline(0.25, color="grey", lw=0.7, ls=":")
    ax.legend(fontsize=7, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    fig.savefig(png, dpi=120)


def draw_looks(series, png):
    """{name: [[(looks, accuracy), ...] a seed]} -> accuracy against looks, a line a seed. Ours."""
    fig, ax = _axes(1, 5, 3.4)
    for k, (name, curves) in enumerate(series.items()):
        for i, points in enumerate(curves):
            ax.plot(*zip(*points), "o-", ms=4, lw=0.8, color=f"C{k}", label="" if i else name)
    ax.set(xlabel="looks a question", ylabel="accuracy")
    ax.legend(fontsize=8, frameon=False)
    fig.savefig(png, dpi=120)


def draw_key_frames(clip, titles, png):
    """The eight key frames of a clip in a row, under titles {index: text}, else numbers. Ours."""
    frames, _, _ = read_clip(clip, key_frame_positions)
    fig, axes = _axes(8, 11, 1.7)
    for i, (ax, frame) in enumerate(zip(axes, frames), 1):
        ax.imshow(frame)
        ax.set(xticks=[], yticks=[], title=titles.get(i, f"{i}"))
    fig.savefig(png, dpi=120)


def draw_rl(runs, png):
    """{name: [log.jsonl a seed]} -> reward and accuracy of the rollouts over the steps.

    A line is the mean of ten steps and of seeds. Source: ours.
    """
    fig, axes = _axes(2, 11, 3.4)
    figures = {"total": "reward R, Eq. (7)", "accuracy": "accuracy of the rollouts"}
    for ax, (key, label) in zip(axes, figures.items()):
        for name, logs in runs.items():
            values = []
            for log in logs:
                values.append([line[key] for line in read_log(log)])
            smooth = running_mean(np.mean(values, 0))
            last = len(values[0])
            ax.plot(np.arange(last - len(smooth), last), smooth, lw=1, label=name)
        ax.set(xlabel="step", ylabel=label)
    axes[1].legend(fontsize=7, frameon=False)
    fig.savefig(png, dpi=120)


def running_mean(values, n=10):
    """The mean of each n values in a row; the values themselves, where there are fewer."""
    return np.convolve(values, np.ones(n) / n, "valid") if len(values) >= n else np.array(values)


def _axes(columns, width, height):
    from matplotlib.figure import Figure  # no pyplot: nothing to close, no display asked for

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(1, columns)


def draw_growth(growth, png):
    """{"what, against": [[x, seconds]]} -> a panel each; the x axis is logarithmic. Ours."""
    fig, axes = _axes(len(growth), 4 * len(growth), 3)
    for ax, (name, points) in zip(np.atleast_1d(axes), growth.items()):
        what, against = name.split(", ")
        x, y = np.array(points).T
        ax.plot(x, 1e3 * y, "o-", lw=1, ms=4)
        ax.set(xscale="log", xlabel=against, ylabel=f"CPU ms of {what}", ylim=(0, 1.1e3 * max(y)))
        ax.set_xticks(x, [f"{int(value):,}" for value in x])
        ax.set_xticks([], minor=True)
    fig.savefig(png, dpi=110)


LABELS = {"ce": "L_CE a token, Eq. (2)", "latent": "L_latent, Eq. (3)"}
SFT_PANELS = (("ce", "eval_ce"), ("latent", "eval_latent"), ("grad_norm",))
ON_LOG_SCALE = ("ce", "latent", "grad_norm")


def draw_curves(log, png, panels=SFT_PANELS):
    """log.jsonl -> its keys over the steps as a picture, a panel a tuple of keys. Ours.

    Each step is drawn thin, the mean of ten thick; what was held out (eval_*), as it is. A panel
    without a value but 0 is left out.
    """
    lines = read_log(log)
    with_values = [keys for keys in panels if any(line.get(key) for line in lines for key in keys)]
    panels = with_values or panels[:1]
    fig, axes = _axes(len(panels), 4 * len(panels), 3)
    for ax, keys in zip(np.atleast_1d(axes), panels):
        for key in keys:
            # a step without an update, or a look at what was held out, has no such figure
            some = [line for line in lines if line.get(key) is not None]
            if some:
                steps, values = [line["step"] for line in some], [line[key] for line in some]
                (thin,) = ax.plot(steps, values, lw=0.6, alpha=0.5)
                mean = values if key.startswith("eval_") else running_mean(values)
                label = LABELS.get(key, key.replace("_", " "))
                ax.plot(steps[-len(mean) :], mean, color=thin.get_color(), label=label)
        ax.set(xlabel="step", yscale="log" if keys[0] in ON_LOG_SCALE else "linear")
        ax.legend(frameon=False, fontsize=8)
    fig.savefig(png, dpi=110)


def tabulate_selection(rows, gains, fates):
    """How many candidates of curation had which fate -> {by: {key: Counter}}, by all, category,
    future frames and gain (Fig. 6).

    rows: {id: Row, or Skipped}; gains: {id: gain} of those that have one; fates: {id: fate}.
    """
    keys = {"all": {}, "category": {}, "future frames": {}, "gain": {}}
    for id, row in rows.items():
        readable = isinstance(row, Row)
        keys["all"][id] = "all"
        keys["category"][id] = row.group if readable else "?"
        future = [part for part in row.response if isinstance(part, Frame)] if readable else []
        keys["future frames"][id] = len(future) if readable else "?"
        keys["gain"][id] = gains.get(id, "?")
    tables = {}
    for by, key_of in keys.items():
        order = sorted(set(key_of.values()), key=lambda key: (isinstance(key, str), key))
        tables[by] = {key: Counter() for key in order}
        for id, key in key_of.items():
            tables[by][key][fates[id]] += 1
    return tables


def selection_text(tables, fates):
    """The tables of `tabulate_selection` as text."""
    lines = [""]
    for by, table in tables.items():
        lines += ["", f"{by:<16}" + "".join(f"{fate:>14}" for fate in fates)]
        for key, count in table.items():
            lines.append(f"{key:<16}" + "".join(f"{count[fate]:>14}" for fate in fates))
    return "\n".join(lines)


def draw_selection(tables, fates, png):
    """What curation chose, as a picture: how many candidates have which gain (Fig. 6), category and
    number of future frames.

    tables: {by: {key: {fate: count}}} of `tabulate_selection`; fates: their names, in order.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shape = dict(figsize=(12, 3.4), constrained_layout=True, width_ratios=(2, 1, 1))
    fig, axes = plt.subplots(1, 3, **shape)
    for ax, by in zip(axes, ("gain", "category", "future frames")):
        keys = list(tables[by])
        below = np.zeros(len(keys))
        for fate in fates:
            counts = np.array([tables[by][key].get(fate, 0) for key in keys])
            ax.bar([str(key) for key in keys], counts, bottom=below, label=fate)
            below += counts
        ax.set_xlabel(by)
    axes[0].set(xlabel="gain, p_v - p_t", ylabel="candidates")
    axes[1].tick_params(axis="x", rotation=30)
    axes[2].legend(fontsize=7, frameon=False)
    fig.savefig(png, dpi=110)
    plt.close(fig)


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with errors_in_one_line("--debug" in sys.argv):
        if not folders or folders[0].startswith("-"):
            raise SystemExit(
                "usage: python -m common.report FOLDER [FOLDER ...]: folders that evaluate.py wrote"
            )
        print(compare(folders))
