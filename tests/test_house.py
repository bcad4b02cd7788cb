"""Arrows run down: every file imports from its own floor's neighbours below, and nothing makes a
circle.
"""

import ast
import glob
import os

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# what the ground stands on
CELLAR = ("common.ahead", "common.clips", "common.formats", "common.shared_prefix")
GROUND = {"model", "data"}
SCRIPTS = {"latent_decode", "rewards", "sft", "la_dapo", "curate", "evaluate", "sample"}
LOOPS = {"sft", "la_dapo", "curate", "evaluate", "sample"}  # no script imports one of these
PARTS = ("*.py", "common/*.py", "toy/*.py", "tools/*.py", "variants/*.py")


def modules():
    """{"common.clips": {modules of the project it imports}, ...}."""
    paths = [p for part in PARTS for p in glob.glob(os.path.join(ROOT, part))]
    names = {os.path.relpath(p, ROOT)[:-3].replace(os.sep, "."): p for p in paths}
    imports = {}
    for name, path in names.items():
        with open(path, encoding="utf-8") as f:
            nodes = list(ast.walk(ast.parse(f.read())))
        wanted = {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names}
        for node in nodes:
            if isinstance(node, ast.ImportFrom):
                wanted.add(node.module)
                wanted |= {f"{node.module}.{a.name}" for a in node.names}
        imports[name] = wanted & set(names) - {name}
    return imports


def floor(name):
    """0 model and data (with the four files they may use), 1 common, 2 scripts, 3 variants and
    tools, 4 toy.
    """
    folder = name.split(".")[0] if "." in name or name in ("common", "toy", "tools") else ""
    if name in GROUND or name in CELLAR:
        return 0
    return {"common": 1, "": 2, "variants": 3, "tools": 3, "toy": 4}[folder]


def allowed(name, target):
    """Whether the rule "arrows run down" lets `name` import `target`."""
    if name in CELLAR:
        return target in CELLAR
    if name == "latent_decode":
        return target in GROUND or target.startswith("common.")
    if name in SCRIPTS and target in LOOPS:
        return False
    return floor(target) <= floor(name)


def wrong(imports):
    return {(a, b) for a, targets in imports.items() for b in targets if not allowed(a, b)}


def test_arrows_run_down():
    """Breaks if plumbing imports the method, a script another's loop, or anything the floor
    above.
    """
    imports = modules()
    assert {"model", "sft", "common.run", "toy.table", "tools.bench"} <= set(imports)
    assert sum(map(len, imports.values())) > 30
    assert wrong(imports) == set()


def test_the_rule_itself():
    """Breaks if the test above would let a wrong arrow through."""
    bad = {
        "common.run": {"sft"},
        "la_dapo": {"sft"},
        "latent_decode": {"rewards"},
        "model": {"common.run"},
    }
    bad |= {"common.clips": {"model"}, "sft": {"tools.bench"}, "tools.bench": {"toy.world"}}
    assert len(wrong(bad)) == len(bad)
    assert not wrong({"la_dapo": {"rewards", "common.run", "data"}, "toy.world": {"sft"}})


def test_no_circle():
    """Breaks if two files import each other, directly or by way of others."""
    left = modules()
    while left:
        free = {name for name, targets in left.items() if not targets & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {name: targets for name, targets in left.items() if name not in free}
