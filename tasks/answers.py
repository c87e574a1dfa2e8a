r"""What the answers of several tasks have in common: <answer> tags, \boxed{}, code blocks.

Their spelling is in spelling.py."""

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
    return re.sub(r"```[^\n`]{0,20}\n|`", "", inside) if opened and closed else ""  # a fence is no answer


def boxed(text: str) -> str | None:
    r"""What is in the last \boxed{...}, up to the brace that closes it; None without one, or without that."""
    starts = [match.end() for match in re.finditer(r"\\boxed\s*\{", text)]
    inside, depth = text[starts[-1] :] if starts else "", 1
    for match in re.finditer(r"\\.|[{}]", inside, re.DOTALL):
        depth += {"{": 1, "}": -1}.get(match[0], 0)  # \{ and \} are no braces
        if depth == 0:
            return inside[: match.start()]
    return None


LANGUAGE = re.compile(r"(?:lang(?:uage)?-)?i?(?:python|py)[0-9.]{0,6}(?![a-z])", re.IGNORECASE)


def code_block(text: str) -> str:
    """The first block fenced as Python (```python, ```py, ``` Python3, ~~~python); one that the end of the
    text cuts off counts. It ends at a line that begins with the fence; if there is none, where a line ends
    in it."""
    lines = text.splitlines(keepends=True)
    for number, line in enumerate(lines):
        at, fence = min((line.find(mark) % (len(line) + 1), mark) for mark in ("```", "~~~"))
        info = line[at:].lstrip(fence[0]).strip() if at < len(line) else ""
        if LANGUAGE.match(info.lstrip("{.")) and fence not in info and line.endswith(("\n", "\r")):
            opening = line[at : len(line) - len(line[at:].lstrip(fence[0]))]
            return textwrap.dedent("".join(until(opening, lines[number + 1 :])))
    return ""


def until(fence: str, lines: list[str]) -> list[str]:
    """The lines before the one that begins with the fence, best outside of a text in triple quotes and as
    long as the opening one; or, if none does, up to one that ends in it."""
    begin = [k for k, line in enumerate(lines) if line.lstrip(" \t").startswith(fence[:3])]
    quotes, checked = "", 0  # the triple quotes that are open
    for k in begin:
        for mark in re.findall("\"\"\"|'''", "".join(lines[checked:k])):
            quotes = "" if mark == quotes else quotes or mark
        checked = k
        if not quotes and lines[k].lstrip(" \t").startswith(fence):
            return lines[:k]
    if begin:
        return lines[: begin[0]]
    fence = fence[:3]
    for k, line in enumerate(lines):
        if line.rstrip().endswith(fence):
            return [*lines[:k], line.rstrip().removesuffix(fence)]
    return lines


def draw_text(text: str, row: dict) -> list[str]:
    """The question in two lines, the end of the answer in three or its code in eight, and what is right; at
    most 100 columns."""
    code = code_block(text).splitlines() if "tests" in row else []
    answer = code[:8] or textwrap.wrap(text[-1000:], 90)[-3:] or ["(nothing)"]
    question = textwrap.wrap(row["question"], 90, max_lines=2, placeholder=" ...")
    lines = [f"  {line}" for line in question] + [f"> {line}" for line in answer] + [f"= {row['answer']}"]
    return ["".join(c if c.isprintable() else " " for c in line[:100]) for line in lines]
