"""What an evaluation looks like: report.html, one file that opens without a server, and a page over
several runs.

    python -m common.page runs/eval_text runs/eval_latent compared.html   # several runs on one page

`evaluate.py` calls `pictures.imagined` for the samples it was told to show, while their latents are
at hand, and `write_report` at its end. A sample shows side by side what was seen, what each span
imagined (if the model has a painter beside it), and what really came. Below, a span is beside the
frames it is nearest to: the cosine between a latent and the vision embedding of a frame (the best
over the frame's tokens), mean over the span's latents. Embeddings may share much of their
direction, so compare the values of a row with each other, not with 1. No script, no link to
elsewhere; what comes from data is escaped.

Axis letters: N latents, F frames, M spans.
"""

import base64
import json
import re
import sys
from html import escape
from typing import NamedTuple

import torch

from common.benchmarks import read_benchmark
from common.cli import errors_in_one_line
from common.clips import ClipError, film, jpeg
from common.report import differences, paper_rows, read_summary, score_rows, scored_lines, used
from common.runs import write
from model import LATENT_END, LATENT_START

OPEN = 6  # samples that are open when the page is

STYLE = """
body{font:15px/1.45 system-ui,sans-serif;margin:0 auto;max-width:62rem;padding:.6rem;color:#222;
overflow-wrap:anywhere}
h1{font-size:1.4rem}h2{font-size:1.1rem;margin:1.4rem 0 .4rem}
.wide{overflow-x:auto;margin-bottom:.6rem}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.85rem;
white-space:nowrap}
td,th{padding:.15rem .45rem;text-align:right;border-bottom:1px solid #ddd}
td:first-child,th:first-child{text-align:left}
details{border:1px solid #ccc;border-radius:.4rem;margin:.4rem 0;padding:.3rem .6rem}
summary{cursor:pointer}
.beside{display:flex;flex-wrap:wrap;gap:.2rem 1.4rem}
.strip{display:flex;flex-wrap:wrap;gap:.3rem;margin:.3rem 0}
.strip figure{margin:0;width:4.6rem;font-size:.7rem;text-align:center}
.strip i{display:block;height:4.2rem;background:#eee center/contain no-repeat;
border:3px solid #bbb;border-radius:.2rem}
.strip .seen i{border-color:#3778bf}.strip .future i{border-color:#2a9d4a}
.strip .imagined i{border-color:#c77d1a}.strip .none i{border-style:dashed}
.span{border-left:4px solid #c77d1a;padding-left:.5rem;margin:.4rem 0;background:#fdf6ec}
.text{white-space:pre-wrap;margin:.3rem 0}.key{font-size:.8rem;color:#555;margin:.3rem 0 0}
.about table{white-space:normal}.about td{text-align:left;vertical-align:top}
.about td:first-child{white-space:nowrap}
.right{color:#1c7a35}.wrong{color:#b3261e}.bar{fill:#c77d1a}svg{max-width:100%;height:auto}
"""


def page_of(title, css, body):
    """A whole page as text."""
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8">'
        f'<meta name="viewport" content="width=device-width">'
        f"<title>{escape(title)}</title><style>{STYLE}{''.join(css)}</style>{body}</html>"
    )


def table_of(head, rows):
    cells = "".join(f"<th>{escape(str(h))}</th>" for h in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(c))}</td>" for c in row) + "</tr>" for row in rows
    )
    return f'<div class="wide"><table><tr>{cells}</tr>{body}</table></div>'


def telling(head, rows):
    """A table of scores without the columns that say nothing -> head, rows, a note of what went.

    These are counts that are 0 everywhere, and readings that equal the accuracy everywhere.
    """
    columns = dict(zip(head, zip(*rows)))
    zero = [name for name, cells in columns.items() if {str(cell) for cell in cells} <= {"0", ""}]
    main = columns.get("accuracy")
    same = [n for n, cells in columns.items() if n != "accuracy" and main and cells == main]
    kept = [i for i, name in enumerate(head) if name not in zero + same]
    notes = [f"{name}: 0" for name in zero] + [f"{name}: as accuracy" for name in same]
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows], "; ".join(notes)


# ------------------------------------------------------------------------------- pictures of a row


class Shown(NamedTuple):
    """A row's frames and where their pictures are."""

    name: str  # frame f is the CSS class <name><f>
    frames: list  # of (label, role, pixels), as `film`
    error: str = ""  # why there are none


def show_frames(name, row, css):
    """The frames around a row -> Shown; their pictures go to `css`, once however often shown."""
    try:
        frames = film(row)
    except ClipError as e:
        return Shown(name, [], str(e))
    for f, (_, _, pixels) in enumerate(frames):
        add_picture(css, f"{name}{f}", "jpeg", base64.b64encode(jpeg(pixels, 112)).decode())
    return Shown(name, frames)


def add_picture(css, name, kind, data):
    """A picture in base64 -> css: <i class=name> shows it."""
    css.append(f"i.{name}{{background-image:url(data:image/{kind};base64,{data})}}")


def show_painted(name, info, css):
    """What the spans of an answer painted -> figures, one a span; "" where nothing was."""
    figures = []
    for m, data in enumerate(info.get("painted", [])):
        add_picture(css, f"{name}z{m}", "png", data)
        figures.append(_figure(f"{name}z{m}", "imagined", f"{m + 1}"))
    return figures


def _figure(name, role, label, value=None):
    text = escape(label) + (f"<br>{value:.3f}" if value is not None else "")
    return f'<figure class="{role}"><i class="{name}"></i>{text}</figure>'


def side_by_side(parts):
    """{heading: figures} -> these strips beside each other; what is empty is left out."""
    strips = []
    for heading, figures in parts.items():
        if figures:
            strip = f'<div class="strip">{"".join(figures)}</div>'
            strips.append(f'<div><p class="key">{heading}</p>{strip}</div>')
    return f'<div class="beside">{"".join(strips)}</div>'


def figures_of(shown, role):
    """The figures of a row's frames that have a role."""
    figures = []
    for f, (label, its_role, _) in enumerate(shown.frames):
        if its_role == role:
            figures.append(_figure(f"{shown.name}{f}", role, label))
    return figures


def question_of(row):
    """The question, and the options that it does not already name, as text."""
    options = []
    for i, option in enumerate(row.options or []):
        if option not in row.question:
            options.append(f"{chr(65 + i)}) {option}")
    between = "   " if sum(map(len, options)) < 60 else "\n"
    return "\n".join([row.question, between.join(options)]).strip()


# -------------------------------------------------------------------------------------- one sample


def _sample(number, row, line, css, heading="imagined"):
    """One sample as a <details>, the first OPEN of them open. heading: of what its spans show."""
    name, info = f"p{number}_", line["imagined"]
    shown = Shown(name, [], info["error"]) if "error" in info else show_frames(name, row, css)
    info = dict(info, error=shown.error) if shown.error else info
    painted = [] if "error" in info else show_painted(name, info, css)
    seen, came = figures_of(shown, "seen"), figures_of(shown, "future")
    pictures = side_by_side({"seen": seen, heading: painted, "what really came": came})
    good, verdict, rewards = _verdict(line, info)
    return (
        f"<details{' open' if number < OPEN else ''}><summary>"
        f'<b class="{"right" if good else "wrong"}">{escape(verdict)}</b> · '
        f"{escape(row.group)} · {escape(row.id)}</summary>"
        f'<p class="text"><b>{escape(question_of(row))}</b></p>{pictures}'
        f'<p class="key">response</p>{_response(line["response"], info, shown, painted)}'
        f"<p>true answer: <b>{escape(row.answer)}</b></p>"
        f'<p class="key">{escape(rewards)}</p>{_similarity(info)}</details>'
    )


def _response(response, info, shown, painted):
    """A response as HTML: its words, and a strip of frames for each span."""
    body, at = [], 0
    if "error" in info:
        body.append(f'<p class="text">{escape(info["error"])}</p>')
    for k, part in enumerate(response.replace("<|im_end|>", "").split(LATENT_START)):
        if k and "error" in info:
            body.append('<div class="span">a span</div>')
        elif k:
            body.append(_span(k - 1, at, info, shown, painted))
            at += info["spans"][k - 1]
        words = part.partition(LATENT_END)[2] if k else part
        body.append(f'<p class="text">{escape(words)}</p>' if words.strip() else "")
    return "".join(body)


def _span(k, at, info, shown, painted):
    """One span: its picture, the five frames nearest to its latents, every value behind them."""
    n = info["spans"][k]
    if not n or not info["cosine"]:
        return f'<div class="span">span {k + 1}: {n} latents</div>'
    cosine = torch.tensor(info["cosine"][at : at + n])  # (n, F)
    mean = cosine.mean(0)
    strip = painted[k] if painted else ""
    for f in mean.argsort(descending=True)[:5].tolist():
        label, role, _ = shown.frames[f]
        strip += _figure(f"{shown.name}{f}", role, label, mean[f].item())
    values = [[i, *(f"{v:.3f}" for v in line)] for i, line in enumerate(cosine.tolist(), 1)]
    values = table_of(["latent", *info["frames"]], values)
    what = "its picture and the nearest frames" if painted else "nearest frames first"
    return (
        f'<div class="span">span {k + 1}: {n} latent{"s" * (n > 1)}, {what}'
        f'<div class="strip">{strip}</div>'
        f"<details><summary>cosine of each latent and frame</summary>{values}</details></div>"
    )


def _verdict(line, info):
    """-> (whether a sample is shown as right, the verdict, its rewards and letters), as text."""
    rewards = (
        f"R_fmt {info.get('format', 0):.0f}, repetition {info.get('repetition', 0):.2f}, "
        f"R_div {info.get('diversity', 0):.3f}"
    )
    if "right" in line:
        wrong = "unparsed" if line["picked"] is None else "wrong"
        readings = [name for name in ("strict", "official") if name in line]
        letters = ", ".join(f"{name} {line[name] or '-'}" for name in readings)
        rewards = f"R_acc {float(line['right']):.0f}, {rewards}; letters: {letters}"
        return line["right"], "right" if line["right"] else wrong, rewards
    judged, verdict = line.get("judged"), "not judged"
    if judged:
        verdict = f"chain {judged['chain']:g}, answer {judged['answer']:g}"
    verdict += f" ({line['why']})" if line.get("why") else ""
    return bool(judged) and judged["average"] >= 3, verdict, rewards


def _similarity(info):
    """The cosines between the means of the spans, as a table; nothing for fewer than two spans."""
    if len(info.get("similarity", [])) < 2:
        return ""
    filled = [str(i) for i, n in enumerate(info["spans"], 1) if n]
    rows = []
    for i, values in zip(filled, info["similarity"]):
        rows.append([i, *(f"{v:.3f}" for v in values)])
    title = '<p class="key">similarity of spans (cosine of their means)</p>'
    return title + table_of(["span", *filled], rows)


# ------------------------------------------------------------------------------------------- pages


def write_report(path, summary, lines, rows):
    """summary.json's content, result lines, their rows -> report.html at `path`. Ours.

    The lines with `imagined` are shown as samples.
    """
    by_id, css, samples = {row.id: row for row in rows}, [], []
    fed = summary["latents"]
    heading = "imagined" if fed == "generated" else f"fed to the spans: {escape(fed)}"
    for line in lines:
        if "imagined" in line and line["id"] in by_id:
            samples.append(_sample(len(samples), by_id[line["id"]], line, css, heading))
    head, table, note = telling(*score_rows(summary["scores"]))
    columns, beside = paper_rows(summary)
    paper = (
        f"<h2>Beside what the paper published (not run here)</h2>{table_of(columns, beside)}"
        f'<p class="key">{escape(used(summary))}</p>'
        if beside
        else ""
    )
    about = [(k, json.dumps(summary[k], ensure_ascii=False)) for k in summary if k != "scores"]
    body = (
        f"<h1>{escape(summary['benchmark'] or 'evaluation')}: {escape(summary['model'])}</h1>"
        f"<p>{summary['found']} of {summary['total']} samples found, "
        f"latents: {escape(summary['latents'])}</p>"
        f'{table_of(head, table)}<p class="key">{escape(note)}</p>'
        f'<h2>{len(samples)} samples</h2><p class="key">'
        f"Borders: blue = seen, orange = imagined, green = what really came, grey = other frames "
        f"of the clip. Values: cosine.</p>{''.join(samples)}"
        f"<h2>Spans per answer</h2>{_chart(summary['scores'])}{paper}"
        f'<details class="about"><summary>settings</summary>{table_of(["", ""], about)}</details>'
    )
    write(path, page_of("evaluation", css, body))


def _chart(scores):
    """Spans per answer by group, as bars."""
    groups, top = (
        [g for g in scores if g != "all"] or ["all"],
        max([s["spans"] for s in scores.values()] + [1e-9]),
    )
    parts, height = [], 26 * len(groups)
    for i, g in enumerate(groups):
        y, width = 26 * i, 150 * scores[g]["spans"] / top
        parts.append(
            f'<text x="0" y="{y + 17}">{escape(g if len(g) < 14 else g[:13] + "…")}</text>'
            f'<rect class="bar" x="100" y="{y + 4}" width="{width:.1f}" height="18"/>'
            f'<text x="{104 + width:.1f}" y="{y + 17}">{scores[g]["spans"]:.2f}</text>'
        )
    return (
        f'<svg viewBox="0 0 300 {height}" width="300" height="{height}" font-size="13" role="img" '
        f'aria-label="spans per answer by group">{"".join(parts)}</svg>'
    )


def write_comparison(folders, path):
    """Several evaluations of the same questions -> one page: their scores, and what each imagined.

    Shown are the samples that the first run's report shows. Raises SystemExit as `differences`.
    """
    summaries = [read_summary(folder) for folder in folders]
    lines = [scored_lines(folder) for folder in folders]
    first = summaries[0]
    rows, _ = read_benchmark(first["benchmark"], first["data"], first["media_root"] or None, [])
    groups, css = list(first["scores"]), []
    scores = []
    for folder, summary in zip(folders, summaries):
        cells = [summary["scores"].get(group) for group in groups]
        cells = [f"{c.get('accuracy', c.get('average', 0)):.3f}" if c else "" for c in cells]
        scores.append([folder, summary["latents"], *cells])

    samples = []
    for row in rows:
        if "imagined" in lines[0].get(row.id, ()):
            answers = {folder: its.get(row.id) for folder, its in zip(folders, lines)}
            samples.append(_compared(len(samples), row, answers, css))
    minus = table_text(differences(folders, groups, first["average"])) if folders[1:] else ""
    body = (
        f"<h1>{len(folders)} runs</h1>{table_of(['', 'latents', *groups], scores)}{minus}"
        f"<h2>{len(samples)} questions</h2>{''.join(samples)}"
    )
    write(path, page_of("several runs", css, body))


def table_text(lines):
    """Text and one markdown table, as lines -> HTML."""
    cells = [[c.strip() for c in line.strip("| ").split(" | ")] for line in lines if "|" in line]
    text = " ".join(line for line in lines if "|" not in line)
    head, _, *rows = cells
    return f'<p class="key">{escape(text)}</p>{table_of(["", *head], rows)}'


def _compared(number, row, answers, css):
    """One question, and below it what each run {folder: result line or None} made of it."""
    name = f"p{number}_"
    shown, body = show_frames(name, row, css), []
    for run, (folder, line) in enumerate(answers.items()):
        if line is None:
            body.append(f'<p class="key">{escape(folder)}: no answer in its results</p>')
            continue
        info = line.get("imagined", {})
        good, verdict, _ = _verdict(line, info)
        words = re.sub(r"<\|[^>]*>", " ", line["response"])
        painted = show_painted(f"{name}{run}r", info, css)
        body.append(
            f'<div class="span"><b class="{"right" if good else "wrong"}">{escape(verdict)}</b> · '
            f'{escape(folder)}<p class="text">{escape(" ".join(words.split()))}</p>'
            f"{side_by_side({'': painted})}</div>"
        )
    frames = {"seen": figures_of(shown, "seen"), "what really came": figures_of(shown, "future")}
    return (
        f"<details{' open' if number < OPEN else ''}><summary>{escape(row.group)} · "
        f"{escape(row.id)}</summary>"
        f'<p class="text"><b>{escape(question_of(row))}</b></p>'
        f"<p>true answer: <b>{escape(row.answer)}</b></p>"
        f"{side_by_side(frames)}{escape(shown.error)}{''.join(body)}</details>"
    )


if __name__ == "__main__":
    *runs, page = [argument for argument in sys.argv[1:] if argument != "--debug"] or [""]
    with errors_in_one_line("--debug" in sys.argv):
        if not runs or not page.endswith(".html"):
            raise SystemExit("usage: python -m common.page FOLDER [FOLDER ...] PAGE.html")
        write_comparison(runs, page)
    print(page)
