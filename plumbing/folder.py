"""The files of a run folder: written so that none is ever half of one, and read so that damage is noticed.

    args.json       the settings, fingerprints of what the run reads, and the update of its checkpoint
    metrics.jsonl   a line for each update and each evaluation
    state.pt        the checkpoint, which replaces the one before as a whole
    before.pt       what the model before training answered, for trace.html
"""

import fcntl
import hashlib
import json
import os
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

import torch

MODEL_FILES = (".json", ".jinja", ".txt", ".model", ".safetensors", ".bin")  # what loading a model reads
MEASURED = ("accuracy", "reward", "parse_fail", "nfe_per_row")  # of an evaluation


def pipes(folder: Path) -> list[Path]:
    """What is in a folder that is no file: to open it would wait for another process, perhaps for ever."""
    return [file for file in folder.glob("*") if file.is_fifo()]


def hold(folder: Path) -> int:
    """Open a folder and lock it for this process, until the descriptor that is returned is closed. Where a
    folder cannot be locked, on some network file systems, it is only opened.

    BlockingIOError if another process holds it."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise
    except OSError:
        pass
    return descriptor


def write_whole(file: Path, write: Callable[[BinaryIO], object]):
    """Let write(an open file) make a new version of `file`; only a complete one replaces the old one."""
    fresh = file.with_name(file.name + ".new")
    write_through(fresh, write)
    os.replace(fresh, file)


def write_through(file: Path, write: Callable[[BinaryIO], object]):
    """Let write(an open file) fill `file`, as far as to the disk. What failed halfway is removed."""
    try:
        with open(file, "wb") as opened:
            write(opened)
            opened.flush()
            os.fsync(opened.fileno())
    except BaseException:
        if file.is_file():
            file.unlink()
        raise


def load_checked(file: Path, check: bool = True, **how) -> dict:
    """torch.load, after a look at the checksums: torch writes a CRC-32 of each tensor and never reads it.

    how: of torch.load. ValueError or an error of torch or zipfile where the file is not what was written."""
    if not file.is_file():
        raise ValueError("it is no file")
    if check:
        with zipfile.ZipFile(file) as archive:
            if wrong := archive.testzip():
                raise ValueError(f"{wrong} in it has changed since it was written (checksum)")
    return torch.load(file, weights_only=True, **how)


def read_lines(data: bytes) -> list[dict]:
    """The lines of metrics.jsonl. ValueError names the first that is not one."""
    lines = []
    for number, text in enumerate(data.splitlines(), 1):
        try:
            line = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is not JSON: {error}") from error
        if not isinstance(line, dict) or type(line.get("update")) is not int:
            raise ValueError(f"line {number} is not of an update")
        if not all(value is None or type(value) is float or type(value) is int and abs(value) < 2**63
                   for value in line.values()):
            raise ValueError(f"line {number} holds what is no number")
        for kind in ("eval", "threshold"):  # of what the table and the curve show
            if f"{kind}_accuracy" in line and None in map(line.get, (f"{kind}_{name}" for name in MEASURED)):
                raise ValueError(f"line {number} is not a whole evaluation")
        lines.append(line)
    return lines


def fingerprint(path: str) -> str:
    """SHA-256 of a file, or of the names and contents of a model folder's files. A second or two per GB.

    A folder of the hub's cache is named by its commit, which says as much. OSError if it cannot be read."""
    place = Path(path)
    if place.parent.name == "snapshots" and place.parent.parent.name.startswith("models--"):
        return place.name
    files = [place]
    if place.is_dir():
        files = sorted(file for file in place.iterdir() if file.suffix in MODEL_FILES and file.is_file())
    digest = hashlib.sha256()
    for file in files:
        with open(file, "rb") as opened:
            digest.update(f"{file.name if place.is_dir() else ''} ".encode("utf-8", "surrogateescape"))
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
