"""What an evaluation leaves: summary.json, report.html, and the table that is printed."""

import hashlib
import json
import os
from collections import Counter

import numpy as np

from common.benchmarks import PAPER
from common.page import write_report
from common.report import as_text, paper_rows, score_rows, used
from common.runs import commit, write_json


def about(rows, lines, config, no_option):
    """What one needs to know of a result besides its scores, as a dict. Source: ours.

    no_option: ids of the rows whose answer is none of their options.

    seconds: a batch's wall time over its rows, by group (--batch 1 for the time one answer takes;
    paper's Table 7). prompt_hash: of the system message and the prompts, a medium by its kind.
    """
    read = [line for line in lines if "skipped" not in line]
    seconds = {}
    for group in [*sorted({line["group"] for line in read} - {"all"}), "all"]:
        values = [line["seconds"] for line in read if group in ("all", line["group"])]
        seconds[group] = round(float(np.mean(values)), 4) if values else 0.0

    prompts = []
    for row in rows:
        parts = [p if isinstance(p, str) else type(p).__name__ for p in row.prompt]
        prompts.append([config.system, *parts])
    hashed = hashlib.sha256(json.dumps(prompts).encode()).hexdigest()[:16]
    lengths = dict(max_new_tokens=config.max_new_tokens, max_latents=config.max_latents)

    return dict(
        found=len(read),
        total=len(rows),
        coverage=len(read) / len(rows),
        commit=commit(),
        seconds=seconds,
        missing=[dict(id=line["id"], why=line["skipped"]) for line in lines if "skipped" in line],
        no_option=no_option,
        unparsed=sum(not line.get("parsed", line.get("picked") is not None) for line in read),
        judge_failures=sum("why" in line for line in read),
        frames=config.num_frames,
        pixels=dict(zip(("image", "future", "video"), config.budgets)),
        prompt_hash=hashed,
        generation=dict(greedy=True, **lengths),
    )


def show(out, summary, lines, rows):
    """Write summary.json and report.html, and print the scores."""
    write_json(os.path.join(out, "summary.json"), summary)
    write_report(os.path.join(out, "report.html"), summary, lines, rows)
    every = summary["scores"]["all"]
    print(as_text(*score_rows(summary["scores"])))
    print(
        f"{summary['found']} of {summary['total']} samples found; "
        f"{summary['seconds']['all']:.3g} s and {every['tokens']:.1f} tokens an answer; "
        f"all = {summary['average']} average; {out}/report.html"
    )
    if waiting := every.get("waiting"):
        print(f"{waiting} responses wait for a judge: python -m common.judge {out} --model NAME")
    if summary["benchmark"] in PAPER:
        print("\nbeside what the paper published (not run here)")
        print(as_text(*paper_rows(summary)))
        print(used(summary))


def shown_in_report(rows, n):
    """Ids of n rows, the groups taking turns. Source: ours."""
    turn, order = Counter(), []
    for row in rows:
        turn[row.group] += 1
        order.append((turn[row.group], row.id))
    return {id for _, id in sorted(order, key=lambda pair: pair[0])[:n]}
