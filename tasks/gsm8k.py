r"""GSM8K: word problems whose answer is a number.

    row     {"prompt": "How many ...? ...", "question": "How many ...?", "answer": "1,450"}
    answer  So she has \boxed{1450} apples.
"""

import re
from fractions import Fraction

from tasks import Recipe, column, hub
from tasks.answers import BOXED, between_tags, boxed, draw_text, plain


def gsm8k_row(raw: dict) -> dict:
    question, gold = str(column(raw, "question")), str(column(raw, "ground_truth_answer", "answer"))
    gold = gold.rpartition("####")[2].strip()
    if read_number(gold) is None:
        raise ValueError(f"the answer {gold!r} is not a number")
    return {"prompt": f"{question}\n{BOXED}", "question": question, "answer": gold}


NUMBER = re.compile(r"""[\s(]* ([-+]?) [\s(]* (?=\.?\d) ((?:[1-9]\d{0,2}(?:,\d{3})+|\d+)?(?:\.\d+)?)
    (?:\s*/\s*([1-9]\d*))? (?:\s*\*\s*10\^\s*([-+]?\d\d?)(?!\d))?  # not 18x, 18 or more, 18 hundredths:
    (?![a-z]\b|.*(?:\b(?:and|or|plus|minus|half|squared|cubed)\b|(?:dred|sand|lion)th))
    (?:[a-z](?:\s*\^\s*\d)?|\^?\s*\\circ|[\s.,'"%°/()])*  # a unit""", re.VERBOSE | re.ASCII | re.I)


def read_number(text: str) -> Fraction | None:
    r"""The number in a text such as "$1,450,000", "10 + 8 = 18", "36/2" or "12\text{ m}^2", exactly. None if
    there is none or another ("18 or 19", "17 = 18"), or there may be more to it ("x^{18}", "not 18")."""
    text = plain(re.sub(r"<\|\w*\|>", "", text)) if len(text) <= 200 else ""
    text = re.sub(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}", r"\1/\2", text)
    text = re.sub(r"\\(?:text|math)(?:bf|it|rm)?(?![a-z])|\\(?=[$%])|[{}$€£]", " ", text)
    found = [NUMBER.fullmatch(side) for side in re.split(r"(?<![!<>])=|\bis\b|(?<=[a-z]):", text)]
    values = [Fraction(m[1] + m[2].replace(",", "")) / int(m[3] or 1) * Fraction(10) ** int(m[4] or 0)
              for m in found if m]
    return values[-1] if found[-1] and len(set(values)) == 1 else None


def gsm8k_reward(text: str, row: dict) -> tuple[float, dict[str, float]]:
    r"""1 for the right number, 0.25 for any in a \boxed{} (`format`); a number in answer tags is read too."""
    box = boxed(text)
    value = read_number(between_tags(text) if box is None else box)
    correct, readable = float(value == read_number(row["answer"])), float(value is not None)
    form = 0.0 if box is None else readable
    return correct + 0.25 * form, {"correct": correct, "format": form, "parse_fail": 1 - readable}


TASK = Recipe(gsm8k_row, gsm8k_reward, draw_text, {
    "train": lambda: hub("openai/gsm8k", "main", split="train"),
    "test": lambda: hub("openai/gsm8k", "main", split="test")})
