r"""What the answers of several tasks have in common: <answer> tags, \boxed{}, code blocks, spelling."""

import re
import textwrap

TAGS = """Respond in the following format:
<reasoning>
...
</reasoning>
<answer>
...
</answer>"""  # at the start of the message, as in the d1 family
BOXED = r"Please reason step by step, and put your final answer within \boxed{}."  # at its end


def between_tags(text: str) -> str:
    """What is in the last <answer>...</answer>; nothing without one, or if the last is not closed."""
    _, opened, rest = text.rpartition("<answer>")
    inside, closed, _ = rest.partition("</answer>")
    return re.sub(r"```[a-z]*\n|`", "", inside) if opened and closed else ""  # a fence is no answer


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{...}, up to the brace that closes it; None without one, or without that."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    inside, depth = text[starts[-1] :] if starts else "", 1
    for match in re.finditer(r"\\.|[{}]", inside, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # \{ and \} are no braces
        if depth == 0:
            return inside[: match.start()]
    return None


POWERS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
SPELLING = [  # in a matrix \\ ends a row, and what follows it is no space
    ("[−–]", "-"), ("²", "^2"), ("³", "^3"), (r"[×·]|\\(?:times|cdot)(?![a-z])", "*"),
    (r"÷|\\div(?![a-z])", "/"), (r"(?<!\\)\\[][()!]", ""), (r"\{,\}", ","), (r"(?<!\\)\\[,;: ]|~", " "),
    (r"(?<=\d)\s(?=\d{3}(?!\d))", ""),  # 1 450 000
    (r"(?<![\w.])(\d{1,30}(?:\.\d{1,30})?)[eE]([-+]?\d\d?)(?![\w.])", r"\1*10^{\2}"),
    (rf"(?<=[^\s{{])((?:\s|\\text\s*{{)*)({'|'.join(POWERS)})s?\b",
     lambda found: f"*10^{{{POWERS[found[2]]}}}{found[1]}")]


def plain(text: str) -> str:
    r"""One spelling for minus and times, 1\,450\,000, 1.8e1, 18\text{ million}; without a final dot."""
    for pattern, plainly in SPELLING:
        text = re.sub(pattern, plainly, text)
    return text.strip().removesuffix(".")


def code_block(text: str) -> str:
    """The first ```python (or ```py) block; one that the end of the text cuts off counts."""
    match = re.search(r"```(?:python|py)[^\S\n]*\n(.*?)(?:^[ \t]*```|\Z)", text, re.DOTALL | re.MULTILINE)
    return textwrap.dedent(match[1]) if match else ""


def draw_text(text: str, row: dict) -> list[str]:
    """The question in two lines, the end of the answer in three or its code in eight, and what is right; at
    most 100 columns."""
    code = code_block(text).splitlines() if "tests" in row else []
    answer = code[:8] or textwrap.wrap(text[-1000:], 90)[-3:] or ["(nothing)"]
    question = textwrap.wrap(row["question"], 90, max_lines=2, placeholder=" ...")
    lines = [f"  {line}" for line in question] + [f"> {line}" for line in answer] + [f"= {row['answer']}"]
    return ["".join(c if c.isprintable() else " " for c in line[:100]) for line in lines]
