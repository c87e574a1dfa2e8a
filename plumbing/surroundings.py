"""What a script finds around it, a terminal and environment variables, brought into an order that cannot
hurt it."""

import os
import re
import shutil
import sys
from typing import TextIO

from plumbing.parallel import refuse

TORCHRUN = {"WORLD_SIZE": r"[1-9]\d*", "RANK": r"\d+", "LOCAL_RANK": r"\d+", "LOCAL_WORLD_SIZE": r"[1-9]\d*",
            "MASTER_ADDR": ".+", "MASTER_PORT": r"\d+"}  # what it sets for each process


class Lasting:
    """A stream that outlasts its reader. What a terminal cannot show is replaced, and a terminal or pipe that
    has gone takes no more text, but does not end a run that has hours behind it."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")

    def write(self, text: str) -> int:
        try:
            return self.stream.write(text)
        except OSError:
            return len(text)

    def flush(self):
        try:
            self.stream.flush()
        except OSError:
            pass

    def __getattr__(self, name: str):
        return getattr(self.stream, name)


def settle():
    """Call it before anything is printed. Refuses an incomplete set of torchrun's variables."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # None where it was closed from the start
        if not isinstance(stream, Lasting):
            setattr(sys, name, Lasting(stream))
    # of the boxes of --help: in fewer than six columns tyro never ends, and millions take all memory
    os.environ["COLUMNS"] = str(min(max(shutil.get_terminal_size().columns, 40), 200))
    settle_processes()


def settle_processes():
    """Refuse an incomplete set of torchrun's variables. Without WORLD_SIZE, those left over are removed."""
    if "WORLD_SIZE" not in os.environ:
        for name in TORCHRUN:
            os.environ.pop(name, None)
        return
    wrong = [name for name, form in TORCHRUN.items()
             if not re.fullmatch(form, os.environ.get(name, ""), re.ASCII)]
    if not wrong and int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        wrong = ["RANK"]
    if wrong:
        del os.environ["WORLD_SIZE"]  # else refuse() would ask for the rank
        refuse(f"WORLD_SIZE is set, as torchrun sets it, but {', '.join(wrong)} cannot go with it: unset it, "
               "or start with torchrun --nproc_per_node N")
