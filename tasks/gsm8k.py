r"""GSM8K: word problems whose answer is a number.

    row     {"prompt": "How many ...? ...", "question": "How many ...?", "answer": "1,450"}
    answer  So she has \boxed{1450} apples.
"""

import re
from fractions import Fraction

from tasks import Recipe, hub, written
from tasks.answers import BOXED, between_tags, boxed, draw_text
from tasks.spelling import in_text, opened, plain, quantity

LENGTH = 200  # characters of an answer that is read
UNKNOWN = re.compile(r"(?<![a-zA-Z])[xyzn](?! ?[\w$(.\\])")  # but 9 x 2 is a product


def gsm8k_row(raw: dict) -> dict:
    question, gold = written(raw, "question"), written(raw, "ground_truth_answer", "answer")
    gold = gold.rpartition("####")[2].strip()
    if read_number(gold) is None:
        raise ValueError(f"the answer {gold!r} is not a number")
    return {"prompt": f"{question}\n{BOXED}", "question": question, "answer": gold}


def read_number(text: str, counted: str = "") -> Fraction | None:
    r"""The number in a text such as "$1,450,000", "10 + 8 = 18", "36/2", "18½" or "12\text{ m}^2", exactly.
    None if there is none or another ("18 or 19", "17 = 18", "2x = 18"), or there may be more to it ("x^{18}",
    "not 18").
    counted: a word such as "dozens" that the question asks for, so that it is a unit."""
    tokens = plain(text) if len(text) <= LENGTH else []
    sides = [[]]
    for token in opened(tokens) if len(tokens) <= LENGTH else []:
        last = "".join(sides[-1][-1:])
        colon = token == ":" and (last[-1:].isalpha() or len(sides) > 1 and not last)  # Total: 18; is: 18
        label = in_text(token).rstrip().endswith((":", " is"))  # \text{Total: }
        if colon or label or token == "is" or token == "=" and last not in ("!", "<", ">"):
            sides.append([])
        else:
            sides[-1].append(token)
    values = [quantity(side, counted=counted) for side in sides]
    found = {value for value in values if value is not None}
    before = "".join(sides[-2]) if len(sides) > 1 else ""
    solved = not (UNKNOWN.search(before) and re.search("[0-9]", before))  # nor is x = 9, y = 18 a number
    return values[-1] if len(found) == 1 and solved else None


def gsm8k_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    r"""1 for the right number, 0.25 for any in a \boxed{} (`format`); a number in answer tags is read too."""
    box = boxed(text)
    asked = re.search(r"how many (dozens?|quarters?|thirds?|hundreds?|thousands?|millions?)",
                      row.get("question", "").lower())
    value = read_number(between_tags(text) if box is None else box, asked[1] if asked else "")
    correct, readable = float(value == read_number(row["answer"])), float(value is not None)
    form = 0.0 if box is None else readable
    return correct + 0.25 * form, {"correct": correct, "format": form, "parse_fail": 1 - readable}


TASK = Recipe(gsm8k_row, gsm8k_reward, draw_text, {
    "train": lambda: hub("openai/gsm8k", "main", split="train"),
    "test": lambda: hub("openai/gsm8k", "main", split="test")},
    right=lambda row: f"\\boxed{{{row['answer']}}}")
