"""Small wrong edits, each of which some test must catch: a test of the tests.

    make mutations                                 # all of them: two at a time, about 20 minutes
    python -m tests.mutations kl_sign eps_swapped  # only these
    python -m tests.mutations --check              # only whether each edit still applies
    python -m tests.mutations --table              # write the newest results into docs/mutations.md

tests/mutations.txt holds the edits:

    @ la_dapo.py | tests/test_twin_la_dapo.py tests/test_la_dapo.py     the file, and what is run
    kl_sign: the KL is rewarded                                         a name, the fault in words
    - config.kl * (kl * weight).sum()                                   what stands in the file,
    + -config.kl * (kl * weight).sum()                                  and what is put in its place

The first text has to stand in the file exactly once; a code change that touches it has to change
the edit as well. Several lines in a row make one text. Tests run in the order of the list, without
those marked slow; a slow test is run where the list names it by itself (FILE::TEST), after the
others. The first failure ends the run of an edit, and a run that hangs counts as a failure.

Each edit is made in a copy of the checkout, which itself is never touched. Results go to
runs/mutations.json. The exit code is 1 if an edit passes all its tests.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
EDITS = os.path.join(ROOT, "tests", "mutations.txt")
RESULTS = os.path.join(ROOT, "runs", "mutations.json")
PAGE = os.path.join(ROOT, "docs", "mutations.md")
WORKERS = 2
LIMIT = 300  # seconds of a run


class Edit(NamedTuple):
    """One wrong edit."""

    name: str
    fault: str  # in words
    file: str
    old: str
    new: str
    tests: list  # files, or single tests as FILE::TEST


def read_edits(path=EDITS):
    """The edits of a file in the format above -> {name: Edit}."""
    edits, name = {}, ""
    with open(path, encoding="utf-8") as f:
        lines = f.read().splitlines()
    for line in lines:
        if line.startswith("@ "):
            file, _, tests = line[2:].partition(" | ")
        elif line.startswith(("- ", "+ ")):
            edit = edits[name]
            which = "old" if line[0] == "-" else "new"
            before = getattr(edit, which)
            text = line[2:] if before is None else f"{before}\n{line[2:]}"
            edits[name] = edit._replace(**{which: text})
        elif line:
            name, _, fault = line.partition(": ")
            if name in edits:
                raise SystemExit(f"{path}: two edits are called {name}")
            edits[name] = Edit(name, fault, file, None, None, tests.split())
    return {name: edit._replace(new=edit.new or "") for name, edit in edits.items()}


def broken(edit):
    """The file of an edit with the fault in it. Raises SystemExit if its text is not there once."""
    with open(os.path.join(ROOT, edit.file), encoding="utf-8") as f:
        text = f.read()
    if text.count(edit.old) != 1:
        raise SystemExit(f"{edit.name}: found {text.count(edit.old)} times in {edit.file}, not 1")
    return text.replace(edit.old, edit.new)


def run_tests(edit, folder):
    """Run an edit's tests in a copy that has it -> the first test that fails, or ""."""
    environment = dict(os.environ, OMP_NUM_THREADS="1", PYTHONDONTWRITEBYTECODE="1")
    plain = [test for test in edit.tests if "::" not in test]
    single = [test for test in edit.tests if "::" in test]
    for marker, tests in (("not slow", plain), ("", single)):
        if not tests:
            continue
        options = ["-x", "-q", "--tb=no", "-p", "no:cacheprovider", "-m", marker, *tests]
        command = [sys.executable, "-m", "pytest", *options]
        pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        process = subprocess.Popen(
            command, cwd=folder, env=environment, start_new_session=True, **pipes
        )
        try:
            output, _ = process.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that a test has started
            process.communicate()
            return f"no end within {LIMIT} s"
        if process.returncode in (4, 5):  # a test that is not there
            raise SystemExit(f"{edit.name}: {' '.join(command)}\n{output}")
        if process.returncode:
            lines = [line for line in output.splitlines() if line.startswith(("FAILED ", "ERROR "))]
            return lines[0].split(" ")[1] if lines else f"pytest ended with {process.returncode}"
    return ""


def check_intact(edits):
    """Raises SystemExit if a test of the edits fails without any edit: it would catch nothing."""
    tests = list(dict.fromkeys(test for edit in edits for test in edit.tests))
    alone = [Edit("no edit", "", "", "", "", [test]) for test in tests]
    with ThreadPoolExecutor(WORKERS) as pool:
        failing = [name for name in pool.map(lambda edit: run_tests(edit, ROOT), alone) if name]
    if failing:
        raise SystemExit(f"these fail without any edit: {', '.join(failing)}")


def try_all(edits, folder):
    """Run each edit in one of WORKERS copies below `folder` -> {name: result}, printed as it comes.

    A result is a dict: file, fault, caught (by which test, "" = by none), seconds.
    """
    copies, results = threading.local(), {}

    def copy_of_this_thread():
        if not hasattr(copies, "path"):
            copies.path = os.path.join(folder, threading.current_thread().name)
            leave_out = shutil.ignore_patterns(".*", "__pycache__", "runs")
            shutil.copytree(ROOT, copies.path, ignore=leave_out)
        return copies.path

    def try_one(edit):
        path, began = copy_of_this_thread(), time.time()
        with open(os.path.join(path, edit.file), "w", encoding="utf-8") as f:
            f.write(broken(edit))
        caught = run_tests(edit, path)
        shutil.copy(os.path.join(ROOT, edit.file), os.path.join(path, edit.file))
        seconds = round(time.time() - began)
        results[edit.name] = dict(file=edit.file, fault=edit.fault, caught=caught, seconds=seconds)
        print(f"{edit.name:20} {seconds:4} s  {caught or 'CAUGHT BY NONE'}", flush=True)

    with ThreadPoolExecutor(WORKERS) as pool:
        list(pool.map(try_one, edits))  # a list, so that an error is raised here
    return results


def write_table(edits):
    """Fill the last column of docs/mutations.md from the saved results; a new edit gets a row."""
    with open(RESULTS, encoding="utf-8") as f:
        results = json.load(f)
    with open(PAGE, encoding="utf-8") as f:
        lines = f.read().splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line[:1] == "|"]
    before = {row[0].strip("`"): row[3] for row in rows}  # caught at e715f9d by
    start = next(i for i, line in enumerate(lines) if line.startswith("|---")) + 1

    def cell(test):
        return f"`{test}`" if ".py" in test else test or "**none**"

    table = []
    for name, edit in edits.items():
        now = cell(results[name]["caught"]) if name in results else "not run"
        cells = f"`{name}`", edit.fault, f"`{edit.file}`", before.get(name, "not tried"), now
        table.append(f"| {' | '.join(cells)} |")
    with open(PAGE, "w", encoding="utf-8") as f:
        f.write("\n".join([*lines[:start], *table]) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="edits to try; default all")
    parser.add_argument("--check", action="store_true", help="only see whether all edits apply")
    parser.add_argument("--table", action="store_true", help="write docs/mutations.md and end")
    args, edits = parser.parse_args(), read_edits()
    unknown = [name for name in args.names if name not in edits]
    if unknown:
        parser.error(f"no such edit: {', '.join(unknown)}")
    for edit in edits.values():
        broken(edit)
    if args.check:
        return print(f"{len(edits)} edits, each found once")
    if args.table:
        return write_table(edits)

    chosen = [edits[name] for name in args.names] if args.names else list(edits.values())
    check_intact(chosen)
    with tempfile.TemporaryDirectory() as folder:
        results = try_all(chosen, folder)
    missed = [name for name, result in results.items() if not result["caught"]]
    print(f"{len(results) - len(missed)} of {len(results)} caught; missed: {missed or 'none'}")
    before = {}
    if os.path.exists(RESULTS):
        with open(RESULTS, encoding="utf-8") as f:
            before = json.load(f)
    os.makedirs(os.path.dirname(RESULTS), exist_ok=True)
    with open(RESULTS, "w", encoding="utf-8") as f:
        json.dump(before | results, f, indent=1)
    return sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
