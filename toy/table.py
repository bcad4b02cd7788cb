"""The tables of the embedded world, of one seed or of several.

    python -m toy.table runs/toy/seed_0
    python -m toy.table runs/toy/seed_*      # mean and standard deviation over the seeds

Read are the evaluations in each seed's folder (eval_NAME/summary.json), its curation and its logs,
as toy/demo.sh and toy/controls.sh leave them. A row that some seed lacks says how many have it.
CPU s is the time of the row's own training, without that of the model it starts from. Beside the
first folder, table.md, accuracy.png and rl.png are written.
"""

import json
import os
import re
import sys
from glob import escape, glob

import numpy as np

from common.cli import errors_in_one_line
from common.report import axes, markdown, running_mean
from common.run import read_lines, write
from toy.world import read_jsonl

GROUPS = ("1-hop", "2-hop", "3-hop", "4-hop")

# rows: an evaluation and its title, in the order of the table
ROWS = {
    "base": "base (captions only)",
    "text": "text-only SFT",
    "places": "text-only SFT, chains that say the exact place",
    "pause": "pause tokens (control)",
    "latent": "latent SFT",
    "latent+self": "latent SFT, self-forcing",
    "latent-stop": "latent SFT, no stop term",
    "latent-long": "latent SFT, longer",
    "latent-long-all": "latent SFT, longer, all clips annotated",
    "la-dapo": "RL: LA-DAPO",
    "adjoint": "RL: LA-DAPO, our gradient through the latents",
    "adjoint-1": "RL: LA-DAPO, our gradient, one term of its series",
    "right": "SFT on its own right rollouts (rejection sampling)",
    "text-rl": "RL from text-only SFT",
    "dapo": "RL: DAPO",
    "dapo+ctr": "RL: DAPO + R_ctr",
    "dapo+div": "RL: DAPO + R_div",
    "own-path": "RL: LA-DAPO, our gradient and the rewards' own path",
    "noise": "RL: noisy latents, LA-DAPO",
    "noise-ctr": "RL: noisy latents, DAPO + R_ctr",
    "noise-div": "RL: noisy latents, DAPO + R_div",
    "noise-none": "RL: noisy latents, DAPO",
    "noise-mean": "RL: noisy latents, LA-DAPO, density a mean over D",
    "answers-half": "SFT on the answers that RL sees, half the steps",
    "answers": "SFT on the answers that RL sees",
    "answers-twice": "SFT on the answers that RL sees, twice the steps",
    "answers-long": "SFT on the answers that RL sees, in the seconds of latent SFT and RL",
    "answers-pause": "SFT on the answers that RL sees, a span of pause tokens",
    "latent-answers": "latent SFT, then SFT on the answers, no spans",
    "latent-answers-spans": "latent SFT, then SFT on the answers, half the steps, own latents",
}
FED = {
    "latent": "generated",
    **{f"latent_{fed}": fed for fed in ("zero", "pause", "noise", "shuffled", "true")},
}
CURATED = {
    "able": "before",
    "chosen": "SFT on the selected rows",
    "random": "SFT on as many random rows",
}


def scores_of(folder, name):
    """An evaluation in a seed's folder -> {group: scores}, "all" among them; None without it."""
    path = os.path.join(folder, f"eval_{name}", "summary.json")
    if not os.path.exists(path):
        return None
    with open(path) as f:
        return json.load(f)["scores"]


def cpu_seconds(folder, name):
    """CPU seconds of a training's stage (toy/stage.sh), all its attempts; None without its log."""
    path = os.path.join(folder, "logs", f"{name}.txt")
    if not os.path.exists(path):
        return None
    with open(path, errors="replace") as f:
        spent = re.findall(r"^CPU s: ([\d.]+) \+ ([\d.]+)$", f.read(), re.M)
    return sum(float(user) + float(system) for user, system in spent)


def spread(values, digits=3):
    """Mean and, for two seeds or more, the standard deviation over seeds, as text."""
    text = f"{np.mean(values):.{digits}f}"
    return text + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else "")


def tabulate(folders, rows, groups=GROUPS, seconds=False):
    """{evaluation: title} of those that there are -> a markdown table; avg is the micro average.

    seconds: with a column of CPU seconds. "" if no folder has any of the rows.
    """
    head, lines = ["", *groups, "avg", *["CPU s"] * seconds], []
    for name, title in rows.items():
        found = [scores for folder in folders if (scores := scores_of(folder, name))]
        if not found:
            continue
        if len(found) < len(folders):
            title += f" ({len(found)} of {len(folders)} seeds)"
        cells = [title]
        for group in (*groups, "all"):
            values = [scores[group]["accuracy"] for scores in found if group in scores]
            cells.append(spread(values) if values else "")
        if seconds:
            spent = [cpu_seconds(folder, name) for folder in folders]
            spent = [s for s in spent if s is not None]
            cells.append(spread(spent, digits=0) if spent else "")
        lines.append(cells)
    return markdown(head, lines) if lines else ""


def main_rows(folders):
    """ROWS, then the evaluations of the folders that no table names, by their names."""
    named, rows = {*ROWS, *FED, *CURATED}, dict(ROWS)
    for folder in folders:
        for path in sorted(glob(os.path.join(escape(folder), "eval_*", "summary.json"))):
            name = os.path.basename(os.path.dirname(path)).removeprefix("eval_")
            if name not in named:
                rows[name] = name
    return rows


def curation_figures(folder):
    """What the curation chose, of a seed -> {figure: value}."""
    figures = {}
    for name, title in (("chosen", "selected"), ("random", "random")):
        path = os.path.join(folder, "curation", f"{name}.jsonl")
        if os.path.exists(path):
            records = read_jsonl(path)
            figures["rows in each set"] = len(records)
            asks = [record["group"] in GROUPS for record in records]
            figures[f"share of hops, {title}"] = np.mean(asks) if asks else 0.0
    return figures


def picture_errors(folder):
    """How far pictures of what is imagined are from what came, of a seed -> {what: error}."""
    errors, path = {}, os.path.join(folder, "logs", "painter.txt")
    if os.path.exists(path):
        with open(path) as f:
            found = re.findall(r"^([\d.]+)  (true frames, held out)$", f.read(), re.M)
        errors.update((name, float(value)) for value, name in found)
    path = os.path.join(folder, "pictures", "imagined.json")
    if os.path.exists(path):
        with open(path) as f:
            errors.update(json.load(f))
    return errors


def as_list(seeds):
    """[{figure: value} a seed] -> a list, mean and deviation of the seeds that have a figure."""
    names = dict.fromkeys(name for figures in seeds for name in figures)
    lines = []
    for name in names:
        values = [figures[name] for figures in seeds if name in figures]
        lines.append(f"- {name}: {spread(values)}")
    return "\n".join(lines)


def report(folders):
    """Seeds' folders -> all tables, as text. Raises SystemExit if there is no evaluation."""
    main = tabulate(folders, main_rows(folders), seconds=True)
    if not main:
        raise SystemExit(f"{', '.join(folders)}: no evaluation (eval_NAME/summary.json) in there")
    parts = [f"Accuracy on the held-out clips, {len(folders)} seed(s)", main]
    if fed := tabulate(folders, FED):
        parts += ["Latent SFT, with its spans fed other vectors", fed]
    if curated := tabulate(folders, CURATED):
        parts += ["Curation: a pool of which a third asks for the future", curated]
        parts += [as_list([curation_figures(folder) for folder in folders])]
    if errors := as_list([picture_errors(folder) for folder in folders]):
        title = "Pictures of what is imagined: squared error, 1 = the mean picture always"
        parts += [title, errors]
    return "\n\n".join(parts)


def is_whole(folders, name):
    """Whether all seeds have an evaluation, of all groups."""
    scores = [scores_of(folder, name) for folder in folders]
    return all(some and {*GROUPS} <= {*some} for some in scores)


def draw_rl(runs, png):
    """Draw reward and accuracy of the rollouts over the steps, from {name: [a seed's log.jsonl]}.

    A line is the mean over ten steps and all seeds.
    """
    fig, places = axes(2, 11, 3.4)
    figures = {"total": "reward R, Eq. (7)", "accuracy": "accuracy of the rollouts"}
    for ax, (key, label) in zip(places, figures.items()):
        for name, logs in runs.items():
            values = [[line[key] for line in read_lines(log)] for log in logs]  # (seeds, steps)
            smooth, last = running_mean(np.mean(values, 0)), len(values[0])
            ax.plot(np.arange(last - len(smooth), last), smooth, lw=1, label=name)
        ax.set(xlabel="step", ylabel=label)
    places[1].legend(fontsize=7, frameon=False)
    fig.savefig(png, dpi=120)


def draw_bars(results, names, groups, png):
    """Draw accuracy by group as bars, with a dot for each seed.

    results: [{training: {group: scores}} of each seed]. The grey line is chance among four options.
    """
    fig, (ax,) = axes(1, 9, 3.4)
    groups, n = [*groups, "all"], len(results[0])
    for i, name in enumerate(results[0]):
        values = [[seed[name][group]["accuracy"] for group in groups] for seed in results]
        values = np.array(values)  # (seeds, groups)
        at = np.arange(len(groups)) + (i - (n - 1) / 2) * 0.8 / n
        ax.bar(at, values.mean(0), 0.8 / n, label=names.get(name, name))
        ax.plot(np.repeat(at[None], len(values), 0), values, "k.", ms=3)
    ax.set(xticks=range(len(groups)), xticklabels=[*groups[:-1], "avg"])
    ax.set(ylabel="accuracy", ylim=(0, 1.02))
    ax.axhline(0.25, color="grey", lw=0.7, ls=":")
    # long titles make the picture wider, not the plot smaller
    legend = ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    legend.set_in_layout(False)
    fig.savefig(png, dpi=120, bbox_inches="tight", bbox_extra_artists=[legend])


def draw(folders, out):
    """accuracy.png and rl.png in `out`, of the rows that all folders have."""
    rows = main_rows(folders)
    rows = {name: title for name, title in rows.items() if is_whole(folders, name)}
    results = [{name: scores_of(folder, name) for name in rows} for folder in folders]
    draw_bars(results, rows, GROUPS, os.path.join(out, "accuracy.png"))

    curves = {}
    for name, title in rows.items():
        logs = [os.path.join(folder, name, "log.jsonl") for folder in folders]
        if all(os.path.exists(log) and "total" in read_lines(log)[0] for log in logs):
            curves[title] = logs  # trained with rewards
    if curves:
        draw_rl(curves, os.path.join(out, "rl.png"))


def main(folders):
    """The tables of some seeds on the screen and, with pictures, beside the first folder."""
    folders = [os.path.normpath(folder) for folder in folders]
    text, out = report(folders), os.path.dirname(folders[0]) or "."
    write(os.path.join(out, "table.md"), text + "\n")
    draw(folders, out)
    print(f"\n{text}")


if __name__ == "__main__":
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with errors_in_one_line("--debug" in sys.argv):
        if not arguments or arguments[0].startswith("-"):
            raise SystemExit("usage: python -m toy.table FOLDER [FOLDER ...]: runs/toy/seed_*")
        main(arguments)
