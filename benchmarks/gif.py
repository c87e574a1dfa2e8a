"""The README's first picture, results/denoising.gif: a held-out board that training made solvable, denoised
before and after. It is drawn from what trace.html of a run holds.

python benchmarks/gif.py runs/egspo-sudoku-1
"""

import json
import re
import sys
from pathlib import Path

import matplotlib
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).parent.parent
FONTS = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
SCALE = 2  # drawn larger than shown: Pillow's lines and circles have no smooth edges
CELL, GAP, BOX, MARGIN = 52, 3, 6, 28  # of a cell; between cells, between boxes; around a board
BOARD = 4 * CELL + 2 * GAP + BOX
INK, SOFT, MASK, GOOD, BAD = "#1b1d22", "#646a76", "#dfe2e9", "#18794e", "#c4302b"


def font(size: int, bold: bool = False) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(FONTS / f"DejaVuSans{'-Bold' if bold else ''}.ttf"), size * SCALE)


def shade(ramp: list[list[int]], step: int, S: int, sure: float) -> tuple[int, ...]:
    """The page's colour: the hue tells the step, faint to strong the probability."""
    place = step / max(1, S - 1) * (len(ramp) - 1)
    i = min(len(ramp) - 2, int(place))
    full = [low + (high - low) * (place - i) for low, high in zip(ramp[i], ramp[i + 1], strict=True)]
    return tuple(round(255 + (colour - 255) * (0.12 + 0.88 * sure)) for colour in full)


def frame(row: dict, names: list[str], ramp: list[list[int]], S: int, s: int) -> Image.Image:
    """The question and the state of each column before denoising step s."""
    width, height = 3 * BOARD + 4 * MARGIN, BOARD + 92
    image = Image.new("RGB", (width * SCALE, height * SCALE), "white")
    draw = ImageDraw.Draw(image)

    def text(x: float, y: float, words: str, size: int, colour: str, bold: bool = False, anchor: str = "mm"):
        draw.text((x * SCALE, y * SCALE), words, colour, font(size, bold), anchor)

    for b, name in enumerate(["a held-out board", *names]):
        left, column = MARGIN + b * (BOARD + MARGIN), row["columns"][b - 1] if b else None
        text(left + BOARD / 2, 22, name, 15, INK, bold=True)
        for i in range(16):
            x, y = (left + i % 4 * (CELL + GAP) + (i % 4 > 1) * (BOX - GAP),
                    40 + i // 4 * (CELL + GAP) + (i > 7) * (BOX - GAP))
            given, digit = row["question"][i] != "0", row["question"][i]
            fill, ink, edge = "#f1f2f5", INK, None
            if column:
                digit, step, shown = column["tokens"][i], column["step"][i], column["step"][i] < s
                fill = shade(ramp, step, S, column["p"][i]) if shown else MASK
                light = sum(w * (c / 255) ** 2.2 for w, c in zip((0.21, 0.72, 0.07), fill, strict=True)) \
                    if shown else 1
                ink = "white" if light < 0.25 else INK
                edge = BAD if shown and digit != row["answer"][i] else None
                digit = digit if shown else "0"
            draw.rounded_rectangle([x * SCALE, y * SCALE, (x + CELL) * SCALE, (y + CELL) * SCALE], 7 * SCALE,
                                   fill, edge, 4 * SCALE if edge else 0)
            if digit != "0":
                text(x + CELL / 2, y + CELL / 2, digit, 24, ink, bold=given)
        if column is None:
            text(left, BOARD + 66, f"denoising step {min(s, S)} of {S}", 14, SOFT, anchor="lm")
        elif s >= S:
            wrong = sum(a != b for a, b in zip(column["tokens"], row["answer"], strict=True))
            said = f"{wrong} wrong" if wrong else "solved"
            text(left + BOARD / 2, BOARD + 66, said, 15, BAD if wrong else GOOD, bold=True)
    return image.resize((width, height), Image.LANCZOS)


def main(run: str, file: str = str(ROOT / "results" / "denoising.gif")):
    page = (Path(run) / "trace.html").read_text()
    data = json.loads(re.search(r'id="trace">(.*?)</script>', page)[1])
    ramp = json.loads(re.search(r"const RAMP = (.*?);", page)[1])
    row = next(row for row in data["rows"] if row["kind"] == "became solved")
    frames = [frame(row, data["columns"], ramp, data["S"], s) for s in range(data["S"] + 1)]
    frames[0].save(file, save_all=True, append_images=frames[1:], loop=0, optimize=True,
                   duration=[1200] + [600] * (len(frames) - 2) + [4000])
    print(f"{file}: {Path(file).stat().st_size / 1000:.0f} kB, {len(frames)} states of board {row['row']}")


if __name__ == "__main__":
    main(*sys.argv[1:])
