"""The command line of every script: flags from its Config dataclass, and errors in one line.

    if __name__ == "__main__":
        run_script(train, Config)

Each field of the dataclass is a flag, and the comment behind the field is its help. A value comes
from the first of these that has one: the flag; the file of `--config FILE`; the dataclass, if other
values have changed its default (evaluate.py's benchmarks do); what the model was trained with
(future_l1.json in its folder); the default.
"""

import argparse
import contextlib
import dataclasses
import difflib
import gc
import inspect
import os
import re
import sys
import traceback

from common.folder import SHARED, read_json, trained_with
from common.machine import leave

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
# a field in the source of a dataclass: comment lines above it, its name, the comment behind it
FIELD = re.compile(r"((?:^    # .*\n)*)^    (\w+): \w+ = .*?(?:  # (.*))?$", re.MULTILINE)


def run_script(main, cls, argv=None, positional=None):
    """Run a script: parse the flags into a cls, call main(config), end all ranks together.

    Errors you can fix are printed as one line on stderr, with exit code 2. positional: the field
    that is given without the name of its flag.
    """
    argv = sys.argv[1:] if argv is None else argv
    gc.freeze()  # what the imports made stays: searching it for cycles takes a second at the exit
    with errors_in_one_line("--debug" in argv):
        main(parse_config(cls, argv, positional))
    leave()


@contextlib.contextmanager
def errors_in_one_line(debug=False):
    """Print an error that the user can fix as one line, and exit with code 2; debug: raise it."""
    try:
        yield
    except (SystemExit, ValueError, OSError, ImportError) as e:
        if debug or not worded_for_user(e):
            raise
        text = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else str(e)
        # a single write, because several ranks may print the same error at once
        sys.stderr.write(" ".join(text.split()) + "\n")
        leave(2)


def worded_for_user(error):
    """Whether this project raised the error, with a message for the user.

    An error raised inside a library is a bug, and keeps its traceback.
    """
    if isinstance(error, SystemExit):
        return isinstance(error.code, str)
    raised_in = os.path.abspath(traceback.extract_tb(error.__traceback__)[-1].filename)
    return raised_in.startswith(ROOT + os.sep) and "site-packages" not in raised_in


def parse_config(cls, argv, positional=None):
    """Flags (a list of strings) -> a cls, a config dataclass.

    A value that differs from what the model was trained with is named on stderr. Unknown flags and
    values of a wrong type end the script with code 2. Raises SystemExit for a --config file that
    does not fit, and the errors of the dataclass.
    """
    # --judge-only is --judge_only, but --no-spans keeps its first hyphen
    pattern = re.compile("^(--(?:no-)?)([^=]+)")
    argv = [pattern.sub(lambda m: m[1] + m[2].replace("-", "_"), argument) for argument in argv]
    given = vars(make_parser(cls, positional).parse_args(argv))  # only what was given
    given.pop("debug", None)
    path = given.pop("config_file", None)
    chosen = {**read_saved(path, cls), **given} if path else given
    config, default = cls(**chosen), cls()

    # what the model was trained with, unless a flag or other values have decided otherwise
    shared = [f.name for f in dataclasses.fields(cls) if f.name in SHARED]
    trained = trained_with(chosen["model"]) if shared and chosen.get("model") else {}
    trained = {name: trained[name] for name in shared if name in trained}
    free = [k for k in trained if k not in chosen and getattr(config, k) == getattr(default, k)]
    config = dataclasses.replace(config, **{name: trained[name] for name in free})
    for name, before in trained.items():
        now = getattr(config, name)
        if now != before and os.environ.get("RANK", "0") == "0":
            text = f"{name} is {now!r:.60}, the model was trained with {before!r:.60}"
            print(text, file=sys.stderr)
    return config


def read_saved(path, cls):
    """A --config file, or the folder of a run, which has a settings.json -> {field: value}.

    Raises SystemExit for a name that is no field, and for a value of another type.
    """
    path = os.path.join(path, "settings.json") if os.path.isdir(path) else path
    saved = read_json(path)
    saved.pop("weights", None)  # evaluate.py and curate.py also save their hash
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    for name, value in saved.items():
        if name not in types:
            raise SystemExit(f"--config {path}: this script has no flag {name}")
        if types[name] is float and type(value) is int:
            saved[name] = float(value)
        elif type(value) is not types[name]:
            expected = f"{name} should be {types[name].__name__}"
            raise SystemExit(f"--config {path}: {expected}, found {value!r:.60}")
    return saved


class _Parser(argparse.ArgumentParser):
    """argparse, but an error is one line that suggests a flag for an unknown one."""

    def error(self, message):
        flag = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        near = difflib.get_close_matches(flag[1], self._option_string_actions, n=1) if flag else []
        hint = f": did you mean {near[0]}?" if near else ""
        self.exit(2, f"{message}{hint} (--help lists the flags)\n")


def make_parser(cls, positional=None):
    """A config dataclass -> its parser, which returns only the flags that were given."""
    comments = field_comments(cls)
    usage = f"%(prog)s {positional.upper() + ' ' if positional else ''}[--flag value ...]"
    parser = _Parser(usage=usage, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(cls):
        default = "" if f.default in (None, "") else f" (default: {f.default})"
        text = (comments.get(f.name, "") + default).replace("%", "%%")
        if f.name == positional:
            parser.add_argument(f.name, metavar=f.name.upper(), help=text)
        elif f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, help=text)
        else:
            parser.add_argument(f"--{f.name}", type=f.type, help=text)
    text = "start from the values in this file, such as a run's settings.json, or in a run's folder"
    parser.add_argument("--config", dest="config_file", metavar="FILE", help=text)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def field_comments(cls):
    """A config dataclass -> {field: the comment behind it or in the lines above it}.

    A source that follows the comment, as in `# paper Table 8`, is put in parentheses.
    """
    comments = {}
    for base in reversed(cls.__mro__[:-1]):  # all but `object`
        for above, name, behind in FIELD.findall(inspect.getsource(base)):
            comment = behind or " ".join(re.findall("# (.*)", above))
            comments[name] = re.sub(r"  # (.+)$", r" (\1)", comment)
    return comments
