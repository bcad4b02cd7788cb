"""Names that moved to common/machine.py and common/run.py."""

from common.folder import checkpoints, newest  # noqa: F401
from common.machine import Machine, leave, set_up_ranks  # noqa: F401
from common.run import commit, need_data, read_lines, rows_of, write, write_json  # noqa: F401

read_log = read_lines
