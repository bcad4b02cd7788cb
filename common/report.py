"""Tables, charts and report.html: what an evaluation, a training or a curation shows.

    python -m common.report runs/eval_text runs/eval_latent ...   # several evaluations side by side

evaluate.py ends with `show`. report.html, made from report.html.jinja, is a single file that opens
without a server: the scores, and samples with the frames that were seen, a picture of what each
span imagined (if the model has a painter), and the frames that really came. It has no script and no
link to other files, and text from data is escaped.
"""

import base64
import json
import os
import sys
from collections import Counter

import numpy as np
from jinja2 import Environment, FileSystemLoader

from common.cli import errors_in_one_line
from common.clips import ClipError, film, jpeg
from common.folder import read_json
from common.formats import Row
from common.judge import add_verdicts
from common.results import mean_of, paired_bootstrap, read_book
from common.run import commit, read_lines, write, write_json
from data import shown_prompt
from model import LATENT_END, LATENT_START

# -------------------------------------------------------------------------------- one evaluation


def about(rows, lines, no_option):
    """What summary.json says of an evaluation besides its settings and scores -> a dict.

    no_option: ids of the rows whose answer is none of their options. seconds: the mean time of an
    answer, which is a batch's wall time divided by its rows (--batch 1 gives that of a single
    answer, as in the paper's Table 7).
    """
    read = [line for line in lines if "skipped" not in line]
    return dict(
        found=len(read),
        total=len(rows),
        missing=[dict(id=line["id"], why=line["skipped"]) for line in lines if "skipped" in line],
        no_option=no_option,
        seconds=round(mean_of([line["seconds"] for line in read]), 4),
        commit=commit(),
    )


def shown_in_report(rows, n):
    """The ids of the n rows that report.html shows, taken from the groups in turn."""
    turn, order = Counter(), []
    for row in rows:
        turn[row.group] += 1
        order.append((turn[row.group], row.id))
    return {id for _, id in sorted(order, key=lambda pair: pair[0])[:n]}


def show(out, summary, lines, rows):
    """Write summary.json and report.html of an evaluation, and print its scores."""
    write_json(os.path.join(out, "summary.json"), summary)
    write(os.path.join(out, "report.html"), page(summary, lines, rows))
    every = summary["scores"]["all"]
    print(as_text(*score_rows(summary["scores"])))
    print(
        f"{summary['found']} of {summary['total']} samples found; "
        f"{summary['seconds']:.3g} s and {every['tokens']:.1f} tokens an answer; "
        f"all = {summary['average']} average; {out}/report.html"
    )
    if waiting := every.get("waiting"):
        print(f"{waiting} responses wait for a judge: python -m common.judge {out} --model NAME")


def score_rows(scores):
    """{group: scores} -> (head, rows) of the table on the screen and in report.html."""
    judged = "chain" in next(iter(scores.values()))
    main = ["chain", "answer", "average"] if judged else ["accuracy"]
    readings = [k for k in ("strict", "official") if any(k in s for s in scores.values())]
    counts = ["unparsed", *["failed"] * judged]
    counts += ["official_unparsed"] * ("official" in readings) + ["skipped"]
    names = [name.replace("_", " ") for name in counts]
    head = ["group", "n", *main, "95% interval", *readings, *names, "spans", "latents", "tokens"]

    rows = []
    for group, s in scores.items():
        row = [group, s["n"], *(f"{s[k]:.3f}" if s["n"] else "-" for k in main)]
        row.append("{:.3f} - {:.3f}".format(*s["interval"]) if s["n"] else "-")
        row += [f"{s[k]:.3f}" if k in s else "" for k in readings]
        row += [s.get(k, "") for k in counts]
        rows.append([*row, f"{s['spans']:.2f}", f"{s['latents']:.2f}", f"{s['tokens']:.1f}"])
    return head, rows


def as_text(head, rows):
    """A table as text, with the first column aligned left and the others right."""
    rows = [[str(cell) for cell in row] for row in [head, *rows]]
    wide = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(f"{cell:{'>' if i else '<'}{wide[i]}}" for i, cell in enumerate(row))
        for row in rows
    )


def page(summary, lines, rows):
    """The content of summary.json, result lines and their rows -> report.html as text.

    The lines that have `imagined` are shown as samples.
    """
    by_id, fed = {row.id: row for row in rows}, summary["latents"]
    shown = [line for line in lines if "imagined" in line and line["id"] in by_id]
    show_options = summary["show_options"]
    settings = [(k, json.dumps(summary[k], ensure_ascii=False)) for k in summary if k != "scores"]
    templates = Environment(loader=FileSystemLoader(os.path.dirname(__file__)), autoescape=True)
    return templates.get_template("report.html.jinja").render(
        title=f"{summary['benchmark'] or 'evaluation'}: {summary['model']}",
        summary=summary,
        scores=score_rows(summary["scores"]),
        samples=[sample_of(by_id[line["id"]], line, show_options) for line in shown],
        imagined="imagined" if fed == "generated" else f"fed to the spans: {fed}",
        settings=settings,
    )


def sample_of(row, line, show_options):
    """A row and its result line -> the fields of a sample in the template, as a dict.

    Pictures are (label, data: URL). The prompt is the one that the model saw with show_options.
    """
    info = line["imagined"]
    pictures, error = dict(seen=[], future=[], other=[]), info.get("error", "")
    try:
        for label, role, pixels in film(row):
            data = base64.b64encode(jpeg(pixels, 112)).decode()
            pictures[role].append((label, f"data:image/jpeg;base64,{data}"))
    except ClipError as e:
        error = str(e)
    painted = enumerate(info.get("painted", []), 1)

    # the words of the response, with the spans in their places
    first, *rest = line["response"].replace("<|im_end|>", "").split(LATENT_START)
    lengths, parts = info.get("spans", []), [dict(words=first)]
    for k, text in enumerate(rest, 1):
        n = f": {lengths[k - 1]} latent{'s' * (lengths[k - 1] != 1)}" if k <= len(lengths) else ""
        parts += [dict(span=f"span {k}{n}"), dict(words=text.partition(LATENT_END)[2])]

    good, verdict = verdict_of(line)
    prompt = shown_prompt(row, show_options)
    rewards = (
        f"R_fmt {info.get('format', 0):.0f}, repetition {info.get('repetition', 0):.2f}, "
        f"R_div {info.get('diversity', 0):.3f}"
    )
    letters = [f"{name} {line[name] or '-'}" for name in ("strict", "official") if name in line]
    return dict(
        row=row,
        asked="\n".join(part for part in prompt if isinstance(part, str)).strip(),
        seen=pictures["seen"],
        painted=[(m, f"data:image/png;base64,{data}") for m, data in painted],
        came=pictures["future"],
        parts=parts,
        good=good,
        verdict=verdict,
        options=", ".join(f"{chr(65 + i)}) {text}" for i, text in enumerate(row.options or [])),
        rewards=rewards + f"; letters: {', '.join(letters)}" * bool(letters),
        error=error,
    )


def verdict_of(line):
    """A result line -> whether it is right (True, False, None = not judged), and the same as text.

    An answer to TwiFF-Bench counts as right here if the average of the judge's scores is 3 or more.
    """
    if "right" in line:
        wrong = "unparsed" if line["picked"] is None else "wrong"
        return line["right"], "right" if line["right"] else wrong
    if judged := line.get("judged"):
        return judged["average"] >= 3, f"chain {judged['chain']:g}, answer {judged['answer']:g}"
    return None, f"not judged ({line['why']})" if line.get("why") else "not judged"


# ---------------------------------------------------------------------------- several evaluations


def compare(folders):
    """Several evaluations -> a markdown table of their scores by group, with intervals.

    Below it, each run minus the first. Raises FileNotFoundError for a folder without a
    summary.json, which evaluate.py writes at its end.
    """
    summaries = [read_json(os.path.join(folder, "summary.json")) for folder in folders]
    groups, rows = list(summaries[0]["scores"]), []
    for folder, summary in zip(folders, summaries):
        cells = []
        for group in groups:
            scores = summary["scores"].get(group, {})
            value = scores.get("accuracy", scores.get("average"))
            cells.append(
                "{:.3f} ({:.3f} - {:.3f})".format(value, *scores["interval"]) if scores else ""
            )
        rows.append([folder, summary["latents"], *cells, f"{summary['found']}/{summary['total']}"])
    text = markdown(["", "latents", *groups, "found"], rows)
    if len(folders) > 1:
        text += "\n\n" + differences(folders, groups, summaries[0]["average"])
    return text


def differences(folders, groups, average):
    """Each run minus the first, over the questions that both have a score for -> markdown.

    average: whether "all" is the micro or the macro average of the groups. A difference whose
    interval does not contain 0 is marked. Raises SystemExit if two runs have no question in common,
    or different questions with the same id.
    """
    first, rows = scored_lines(folders[0]), []
    for folder in folders[1:]:
        pairs, cells = pair(first, scored_lines(folder), folders[0], folder), []
        for group in groups:
            some = [(a, b) for a, b in pairs if group in (a["group"], "all")]
            macro = group == "all" and average == "macro"
            cells.append(_difference(some, macro) if some else "")
        rows.append([folder, *cells, len(pairs)])
    return (
        f"Minus {folders[0]}, over the questions both answered; 95 % intervals of the paired\n"
        "difference, clips drawn whole; * = it does not contain 0\n\n"
        + markdown(["", *groups, "questions"], rows)
    )


def scored_lines(folder):
    """The result lines of an evaluation that have a score -> {id: line with its `score`}.

    The score is 0 or 1 with options, and the average of the judge's two scores for TwiFF-Bench.
    """
    lines, scored = read_book(folder, "samples"), {}
    add_verdicts(folder, lines.values())
    for id, line in lines.items():
        if "right" in line:
            scored[id] = dict(line, score=float(line["right"]))
        elif "judged" in line:
            scored[id] = dict(line, score=line["judged"]["average"])
    return scored


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


def markdown(head, rows):
    """A table as markdown."""
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [head, *rows]]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


# ----------------------------------------------------------------------------------------- charts


def axes(columns, width, height):
    """A figure and its axes, without pyplot, which needs a display and figures to be closed."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), layout="constrained")
    return fig, fig.subplots(1, columns, squeeze=False)[0]


def running_mean(values, n=10):
    """The running mean of n values; the values themselves if there are fewer."""
    return np.convolve(values, np.ones(n) / n, "valid") if len(values) >= n else np.array(values)


LABELS = {"ce": "L_CE a token, Eq. (2)", "latent": "L_latent, Eq. (3)"}
SFT_PANELS = (("ce", "eval_ce"), ("latent", "eval_latent"), ("grad_norm",))
ON_LOG_SCALE = ("ce", "latent", "grad_norm")


def draw_curves(log, png, panels=SFT_PANELS):
    """log.jsonl -> a picture of its keys over the steps; a panel is a tuple of keys.

    A thin line shows each step, a thick one the mean of ten steps; held-out figures (eval_*) are
    drawn as they are. A panel that has no values, or only 0, is left out.
    """
    lines = read_lines(log)
    with_values = [keys for keys in panels if any(line.get(key) for line in lines for key in keys)]
    panels = with_values or panels[:1]
    fig, places = axes(len(panels), 4 * len(panels), 3)
    for ax, keys in zip(places, panels):
        for key in keys:
            # steps without an update, and those without a checkpoint, lack some figures
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
    """Count the candidates of a curation by fate -> {by: {key: Counter}}.

    They are counted together, and by category, number of future frames and gain (Fig. 6).
    rows: {id: Row, or Skipped}; gains: {id: gain} of those that have one; fates: {id: fate}.
    """
    tables = {by: {} for by in ("all", "category", "future frames", "gain")}
    for id, row in rows.items():
        group, future = "?", "?"
        if isinstance(row, Row):
            group, future = row.group, len(row.futures)
        for table, key in zip(tables.values(), ("all", group, future, gains.get(id, "?"))):
            table.setdefault(key, Counter())[fates[id]] += 1
    for by, table in tables.items():  # numbers in order, then "?"
        order = sorted(table, key=lambda key: (isinstance(key, str), key))
        tables[by] = {key: table[key] for key in order}
    return tables


def selection_text(tables, fates):
    """The tables of `tabulate_selection` as text."""
    texts = []
    for by, table in tables.items():
        rows = [[key, *(count[fate] for fate in fates)] for key, count in table.items()]
        texts.append("\n" + as_text([by, *fates], rows))
    return "\n".join(texts)


def draw_selection(tables, fates, png):
    """Draw the candidates of a curation by gain (Fig. 6), category and number of future frames.

    tables: {by: {key: {fate: count}}} of `tabulate_selection`; fates: their names, in order.
    """
    fig, places = axes(3, 12, 3.4)
    for ax, by in zip(places, ("gain", "category", "future frames")):
        keys = list(tables[by])
        below = np.zeros(len(keys))
        for fate in fates:
            counts = np.array([tables[by][key].get(fate, 0) for key in keys])
            ax.bar([str(key) for key in keys], counts, bottom=below, label=fate)
            below += counts
        ax.set_xlabel(by)
    places[0].set(xlabel="gain, p_v - p_t", ylabel="candidates")
    places[1].tick_params(axis="x", rotation=30)
    places[2].legend(fontsize=7, frameon=False)
    fig.savefig(png, dpi=110)


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if argument != "--debug"]
    with errors_in_one_line("--debug" in sys.argv):
        if not folders or folders[0].startswith("-"):
            raise SystemExit(
                "usage: python -m common.report FOLDER [FOLDER ...]: folders that evaluate.py wrote"
            )
        print(compare(folders))
