r"""Word problems written by a script, for a small model: it reads well and calculates badly.

    row     {"prompt": "Tom has 3 apples. He buys 4 more. How many ...? ...", "question": "Tom has ...",
             "answer": "7", "steps": 1}
    answer  \boxed{7}

Prompt and reward are those of gsm8k. Somebody has some things; each step is a sentence after which there
are more or fewer of them, or somebody else has more or fewer. Every number on the way is from 1 to 10, and
each answer is about equally likely, so a guess is right one time in ten. The rows of the task have one step.
For harder ones write files, which --data and --test_data take (steps, rows, and the name of a part):

python -m tasks.word_problems 3 8192 train > three.jsonl
"""

import functools
import json
import random
import re
import sys

from tasks import Recipe
from tasks.answers import draw_text
from tasks.gsm8k import gsm8k_reward, gsm8k_row

LARGEST = 10
PARTS = {"train": 8192, "validation": 1024, "test": 1024}

HE = "Tom Ben Sam Max Leo Jack Adam Paul Mark David Peter Henry Oscar Simon Frank Luke Dan George".split()
SHE = "Mia Anna Lily Emma Sara Kate Lucy Nina Rosa Jane Helen Alice Maria Julia Ella Amy Ruth Grace".split()
THINGS = ("apples pears eggs books pens coins stones shells cards toys balls cups hats keys nuts plums "
          "lemons cookies stamps flowers bottles candles tickets marbles stickers pencils buttons ribbons "
          "photos carrots tomatoes potatoes oranges peaches balloons magnets spoons plates ducks").split()
STARTS = ("{name} has {n} {things}.", "{name} owns {n} {things}.", "There are {n} {things} in {name}'s bag.",
          "{name} starts with {n} {things}.", "{name} has a box with {n} {things}.")
MORE = ("{he} buys {n} more.", "{he} finds {n} more.", "{he} gets {n} more.", "{he} is given {n} more.",
        "Then {he} takes {n} more.", "A friend gives {him} {n} more.", "{other} brings {him} {n} more.")
FEWER = ("{he} loses {n} of them.", "{he} sells {n} of them.", "{he} gives {n} away.",
         "{he} drops {n} of them.", "{he} gives {n} to {other}.", "{other} takes {n} of them.",
         "Then {he} throws {n} away.")
THAN = "{other} has {n} {more} {things} than {name}."
ASKED = ("How many {things} does {name} have now?", "How many {things} does {name} have in the end?",
         "How many {things} does {name} have?")


def problem(steps: int, rng: random.Random) -> dict:
    """A problem of so many steps: its question, answer and steps."""
    people = rng.sample(HE + SHE, steps + 2)
    name, others, value = people[0], people[1:], rng.randint(2, LARGEST)
    words = {"things": rng.choice(THINGS)}
    sentences = [rng.choice(STARTS).format(name=name, n=value, **words)]
    for other in others[:steps]:
        after = rng.choice([n for n in range(1, LARGEST + 1) if n != value])
        more, n, value = after > value, abs(after - value), after
        he, him = ("he", "him") if name in HE else ("she", "her")
        if rng.random() < 0.2:
            sentence = THAN.format(other=other, n=n, more="more" if more else "fewer", name=name, **words)
            name = other
        else:
            sentence = rng.choice(MORE if more else FEWER).format(he=he, him=him, other=other, n=n)
        sentences.append(sentence[0].upper() + sentence[1:])
    asked = ASKED[-1] if " than " in sentences[-1] else rng.choice(ASKED)
    sentences.append(asked.format(name=name, **words))
    return {"question": " ".join(sentences), "answer": str(value), "steps": steps}


@functools.cache
def problems(part: str, steps: int = 1, count: int = 0) -> list[dict]:
    """The problems of a part, the same in every run; none is asked twice, in this part or in another."""
    rng, found = random.Random(f"{part}, {steps} steps"), {}
    while len(found) < (count or PARTS[part]):
        row = problem(steps, rng)
        if part_of(row["question"]) == part:
            found[row["question"]] = row
    return list(found.values())


def part_of(question: str) -> str:
    """The part that a question belongs to, by the question alone."""
    return random.Random(question).choice(["train"] * 8 + ["validation", "test"])


def word_problems_row(raw: dict) -> dict:
    row = gsm8k_row(raw)
    return row | {"steps": raw["steps"]} if "steps" in raw else row


TASK = Recipe(word_problems_row, gsm8k_reward, draw_text,
              {part: lambda part=part: problems(part) for part in PARTS},
              right=lambda row: f"\\boxed{{{row['answer']}}}")

if __name__ == "__main__":
    steps, count, part = sys.argv[1:] if len(sys.argv) == 4 else ("", "", "")
    if not re.fullmatch("[1-9]", steps) or not re.fullmatch("[1-9][0-9]{0,5}", count) or part not in PARTS:
        print(f"error: give steps (1 to 9), rows (to 999999), a part ({', '.join(PARTS)})", file=sys.stderr)
        sys.exit(2)
    for row in problems(part, int(steps), int(count)):
        print(json.dumps(row))
