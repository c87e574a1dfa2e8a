"""What is around a method: command line, checkpoints, real models, several processes, tables and figures.

A method imports this when it runs as a script. So here, before anything else of ours, is said what Python
this is for; the methods and common.py themselves are written so that an older one reads them."""

import sys

if sys.version_info < (3, 11):
    print(f"error: Python 3.11 or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
    raise SystemExit(2)
