"""The command line of every script: flags from a dataclass, errors in one line. Ours.

    if __name__ == "__main__":
        run_script(train, Config)

A value is the first of: the flag; `--config FILE`, saved values; the benchmark's protocol
(evaluate.py); what the model was trained with (future_l1.json in its folder); the dataclass's own.
"""

import argparse
import contextlib
import dataclasses
import difflib
import inspect
import json
import os
import re
import sys
import traceback

from common.folder import SHARED, trained_with
from common.machine import leave

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def run_script(main, cls, argv=None, positional=None):
    """The end of a script: flags -> cls -> main(config); then all ranks leave together.

    An error that the user can mend is one line on stderr, with exit code 2; --debug shows where it
    was raised. positional: the field that is given without its flag.
    """
    with errors_in_one_line("--debug" in (sys.argv if argv is None else argv)):
        main(parse_config(cls, argv, positional))
    leave()


@contextlib.contextmanager
def errors_in_one_line(debug=False):
    """An error that the user can mend ends the process: its message on stderr, exit code 2."""
    try:
        yield
    except (SystemExit, ValueError, OSError, ImportError) as e:
        text = user_message(e)
        if text is None or debug:
            raise
        sys.stderr.write(f"{text}\n")  # in one piece: several ranks may say it
        leave(2)


def user_message(error):
    """What an error says to the user, in one line; None for a bug, or the end of a script.

    An error that a line of this project raised is worded for the user. What comes from inside a
    library keeps its traceback.
    """
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, str) else None
    raised_in = os.path.abspath(traceback.extract_tb(error.__traceback__)[-1].filename)
    if not raised_in.startswith(ROOT + os.sep) or "site-packages" in raised_in:
        return None
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def parse_config(cls, argv=None, positional=None):
    """Command line -> a config dataclass: one flag a field, `--no-x` for bools.

    What differs from the settings that the model was trained with is said on stderr. Unknown flags
    and values of a wrong type end the script with code 2. Raises SystemExit for a --config file
    that does not fit, ValueError as the dataclass does.
    """
    argv = sys.argv[1:] if argv is None else argv
    argv = [re.sub("^--(no-)?[^=]+", _underscores, argument) for argument in argv]
    names = [f.name for f in dataclasses.fields(cls)]
    unset = argparse.Namespace(config_file="", debug=False, **dict.fromkeys(names))
    flags = vars(make_parser(cls, positional).parse_args(argv, unset))
    given = {name: flags[name] for name in names if flags[name] is not None}
    saved = read_saved(flags["config_file"], cls) if flags["config_file"] else {}

    chosen = {**saved, **given}
    shared = [name for name in SHARED if name in names]
    trained = trained_with(chosen["model"]) if shared and chosen.get("model") else {}
    inherited = {name: trained[name] for name in shared if name in trained}
    protocol = cls.protocol(chosen) if hasattr(cls, "protocol") else {}
    config = cls(**{**inherited, **protocol, **chosen})
    if os.environ.get("RANK", "0") == "0":
        say_differences(config, inherited)
    return config


def say_differences(config, inherited):
    """Name on stderr what is not as the model was trained. inherited: {name: value}."""
    for name, trained in inherited.items():
        value = getattr(config, name)
        if value != trained:
            text = f"{name} is {value!r:.60}, the model was trained with {trained!r:.60}"
            print(text, file=sys.stderr)


def read_saved(path, cls):
    """A file of saved values, or a run's folder -> {field: value}. Raises SystemExit."""
    path = os.path.join(path, "settings.json") if os.path.isdir(path) else path
    try:
        with open(path, encoding="utf-8") as f:
            saved = json.load(f)
    except json.JSONDecodeError as e:
        raise SystemExit(f"--config {path}: not JSON ({e})") from e
    if not isinstance(saved, dict):
        raise SystemExit(f"--config {path}: expected an object, found {type(saved).__name__}")
    saved.pop("written", None)  # when the weights were: evaluate.py and curate.py note it
    types = {f.name: f.type for f in dataclasses.fields(cls)}
    if unknown := sorted(saved.keys() - types.keys()):
        raise SystemExit(f"--config {path}: this script has no flag {', '.join(unknown)}")
    for name, value in saved.items():
        if type(value) is int and types[name] is float:
            saved[name] = float(value)
        elif type(value) is not types[name]:
            raise SystemExit(
                f"--config {path}: {name} should be {types[name].__name__}, found {value!r:.60}"
            )
    return saved


# ---------------------------------------------------------------------------------------- argparse


class _Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, without the list of all flags."""

    def error(self, message):
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            close = difflib.get_close_matches(unknown[1], self._option_string_actions, n=1)
            message += f": is {close[0]} meant?" if close else ""
        self.exit(2, f"{message} (--help lists the flags)\n")


class _Help(argparse.HelpFormatter):
    """Each flag's help ends with its default, where it has one."""

    def _get_help_string(self, action):
        has_default = action.default not in (None, "", argparse.SUPPRESS)
        return action.help + (" (default: %(default)s)" if has_default else "")


def make_parser(cls, positional=None):
    """A config dataclass -> its parser."""
    comments = field_comments(cls)
    usage = f"%(prog)s {positional.upper() if positional else ''} [--flag value ...]"
    parser = _Parser(usage=" ".join(usage.split()), allow_abbrev=False, formatter_class=_Help)
    for f in dataclasses.fields(cls):
        options = dict(default=f.default, help=comments.get(f.name, "").replace("%", "%%"))
        if f.name == positional:
            parser.add_argument(f.name, metavar=f.name.upper(), **options)
        elif f.type is bool:
            parser.add_argument(f"--{f.name}", action=argparse.BooleanOptionalAction, **options)
        else:
            parser.add_argument(f"--{f.name}", type=f.type, **options)
    text = "start from the values in this file, such as a run's settings.json"
    parser.add_argument("--config", dest="config_file", default="", metavar="FILE", help=text)
    text = "show the whole traceback of an error"
    parser.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=text)
    return parser


def field_comments(cls):
    """A config dataclass -> {field: its comment}, behind it or in the lines above it.

    A source behind the comment, `# paper Table 8`, is put in parentheses.
    """
    parts = [inspect.getsource(c) for c in reversed(cls.__mro__) if dataclasses.is_dataclass(c)]
    comments, above = {}, []
    for line in "\n".join(parts).split("\n"):
        field = re.match(r"    (\w+): \w+ = .*?(?:  # (.*))?$", line)
        if field:
            comment = field.group(2) or " ".join(above)
            comments[field.group(1)] = re.sub(r"  # (.+)$", r" (\1)", comment)
        above = [*above, line.strip()[2:]] if line.startswith("    # ") else []
    return comments


def _underscores(flag):  # --judge-only is --judge_only
    no = flag.group(1) or ""
    return f"--{no}" + flag.group()[2 + len(no) :].replace("-", "_")
