"""What is around a method: command line, checkpoints, real models, several processes, tables and figures.

A method imports this when it runs as a script, so the version of Python is checked here, first. The methods
and common.py alone also run in an older Python."""

import sys

if sys.version_info < (3, 11):
    print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
    raise SystemExit(2)
