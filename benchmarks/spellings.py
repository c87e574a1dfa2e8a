r"""Which spellings of the right answers earn their reward, and which wrong ones do.

Every gold answer of MATH-500 and of GSM8K's test set is given as its own answer and in some 27 other
spellings, each of which must stay equal, or unequal. It prints how many were judged as they must be, and
what was not.

    python benchmarks/spellings.py                      minutes
    python benchmarks/spellings.py --tree OTHER         the rewards of another checkout
    python benchmarks/spellings.py --every 5 --show 30  a fifth of the answers; more of what went wrong
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def changed_digit(text: str) -> str:
    """The last digit one up, 9 to 0."""
    i = max(i for i, c in enumerate(text) if c.isdigit())
    return text[:i] + str((int(text[i]) + 1) % 10) + text[i + 1 :]


def of_numbers(gold: str) -> list[tuple[str, str, bool]]:
    """(name, answer, whether it is right) for an integer or a decimal, perhaps with commas."""
    value = gold.replace(",", "")
    whole, grouped = "." not in value, f"{abs(int(float(value))):,}"
    sign = "-" if value.startswith("-") else ""
    found = [("plain", value, True), ("unit", f"{value} \\text{{ apples}}", True),
             ("bare unit", f"{value} people", True),
             ("area", f"{value} cm^2", True), ("rate", f"{value} km/h", True),
             ("dollars", f"{sign}\\${value.lstrip('-')}", True),
             ("euros", f"€{value}" if not sign else f"-€{value[1:]}", True),
             ("US", f"{sign}US\\${value.lstrip('-')}", True),
             ("after x =", f"x = {value}", True), ("degrees", f"{value}°", True),
             ("end of text", f"{value}<|eot_id|>", True),
             ("another sign", value.replace("-", "−"), True),
             ("text minus", value.replace("-", "\\text{-}"), True),
             ("half more", f"{value}\\frac{{1}}{{2}}", False), ("half more, sign", f"{value}½", False),
             ("thousand", f"{value} thousand", float(value) == 0),
             ("million", f"{value}\\text{{ million}}", float(value) == 0),
             ("thirds", f"{value} thirds", float(value) == 0), ("changed", changed_digit(value), False),
             ("nearly", f"{value}{'.' if whole else ''}{'0' * 20}1", False),
             ("or", f"{value} or 7.25", False),
             ("negative", f"-({value})" if not sign else value[1:], float(value) == 0),
             ("token within", f"{value}<|x|>1", False),
             ("not", f"not {value}", False)]
    if whole:
        found += [("a ratio", f"{3 * int(value)}/3", True),
                  ("frac", f"\\frac{{{2 * int(value)}}}{{2}}", True),
                  ("decimals", f"{value}.00", True), ("power of ten", f"{value}e0", True)]
        groups = [("comma", ","), ("braced comma", "{,}"), ("thin space", "\\,"), ("comma, narrow", ",\\!"),
                  ("comma, narrow and a space", ",\\! "), ("space", " ")]
        if len(grouped) > 3:
            found += [(name, sign + grouped.replace(",", by), True) for name, by in groups]
            found += [("moved comma", sign + grouped[:-4] + grouped[-3:-1] + "," + grouped[-1], False)]
    return found


def of_mathematics(gold: str) -> list[tuple[str, str, bool]]:
    """(name, answer, whether it is right) for any answer of MATH-500."""
    inner = gold.strip("$")
    found = [("itself", gold, True), ("dollars around", f"${inner}$" if "$" not in gold else gold, True),
             ("parentheses", f"\\({gold}\\)", True), ("bold", f"**{gold}**", True),
             ("colour", f"\\color{{red}}{{{gold}}}", True),
             ("text colour", f"\\textcolor{{blue}}{{{gold}}}", True), ("box", f"\\boxed{{{gold}}}", True),
             ("style", f"\\displaystyle {gold}", True), ("final dot", f"{gold}.", True),
             ("spaces", f" {gold}\\quad ", True),
             ("fractions", gold.replace("\\frac", "\\cfrac").replace("\\dfrac", "\\tfrac"), True),
             ("minus", re.sub(r"(?<!\\text\{)-", "−", gold) if "text" not in gold else gold, True),
             ("pi", gold.replace("\\pi", "π"), True), ("degree", gold.replace("^\\circ", "°"), True)]
    words = "text{" in gold and not re.search("[0-9]", gold)
    if "left" not in gold and gold.count("(") == gold.count(")") and not words:
        found += [("sized", gold.replace("(", "\\left(").replace(")", "\\right)"), True),
                  ("big", gold.replace("(", "\\big(").replace(")", "\\big)"), True)]
    if words:
        word = re.sub(r"\\text|[{}]", "", gold)
        found += [("bare", word, True), ("bold text", gold.replace("\\text", "\\textbf"), True),
                  ("negated", f"not {word}", False),
                  ("lower case", word.lower(), True), ("other", f"\\text{{{word[::-1]}!}}", False)]
        return found
    number = re.fullmatch(r"-?[0-9]+(\.[0-9]+)?", gold)
    if number:
        return found[:10] + of_numbers(gold)
    found += [("one more", f"{gold}+1", False), ("or", f"{gold} \\text{{ or }} 7.25", False)]
    if any(c.isdigit() for c in gold):
        found += [("changed", changed_digit(gold), False)]
    if re.fullmatch(r"-?[0-9]+ ?[+-] ?[0-9]*i", gold):
        found += [("roman i", gold.replace("i", "\\mathrm{i}"), True),
                  ("i after a space", gold.replace("i", " i"), True),
                  ("i times", gold.replace("i", "\\cdot i"), True),
                  ("conjugate", gold[0] + gold[1:].translate({43: 45, 45: 43}), False)]
    point = re.fullmatch(r"(?:\\left)?\((.*?)(?:\\right)?\)", gold)
    if point and "," in gold and "infty" not in gold and "cup" not in gold and gold.count("(") == 1:
        inside = point[1].replace("\\left", "")
        found += [("set", f"\\{{{inside}\\}}", False), ("list", inside, False),
                  ("closed", f"[{inside}]", False)]
        if ", " not in inside:
            found += [("spaced", gold.replace(",", " , "), True)]
    if re.fullmatch(r"[0-9, -]+", gold) and "," in gold and not re.search(r",[0-9]{3}$", gold):
        parts = [part.strip() for part in gold.split(",")]
        found += [("other order", ", ".join(parts[::-1]), True),
                  ("as a set", f"\\{{{', '.join(parts)}\\}}", True),
                  ("as a point", f"({', '.join(parts)})", False),
                  ("one left out", ", ".join(parts[1:]), False)]
    if "\\cup" in gold:
        found += [("or", gold.replace("\\cup", "\\text{ or }"), True),
                  ("sign", gold.replace("\\cup", "∪"), True),
                  ("U", gold.replace("\\cup", "U"), True),
                  ("intersection", gold.replace("\\cup", "\\cap"), False)]
    if re.fullmatch(r"-?\\d?frac\{[0-9]+\}\{[0-9]+\}", gold):
        above, below = re.findall("[0-9]+", gold)
        sign = "-" * gold.startswith("-")
        found += [("slash", f"{sign}{above}/{below}", True),
                  ("doubled", f"{sign}\\frac{{{2 * int(above)}}}{{{2 * int(below)}}}", True),
                  ("with a unit", f"{gold} \\text{{ cm}}", True),
                  ("upside down", f"{sign}{below}/{above}", above == below)]
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", default=str(ROOT), help="the checkout whose rewards are tried")
    parser.add_argument("--data", default=str(ROOT.parent / "shared" / "data"),
                        help="MATH500.json, gsm8k_test.json")
    parser.add_argument("--every", type=int, default=1, help="only every n-th answer")
    parser.add_argument("--show", type=int, default=10,
                        help="how many of what was judged wrongly are printed")
    args = parser.parse_args()
    sys.path.insert(0, args.tree)
    try:
        from tasks.gsm8k import gsm8k_reward
        from tasks.math import math_reward
    except ImportError:  # before the tasks had a file each
        from tasks import gsm8k_reward, math_reward

    for name, file, reward, spellings in (("gsm8k", "gsm8k_test.json", gsm8k_reward, of_numbers),
                                          ("math", "MATH500.json", math_reward, of_mathematics)):
        golds = [str(row["ground_truth_answer"]) for row in json.loads((Path(args.data) / file).read_text())]
        tried, held, wrong, start = Counter(), Counter(), [], time.perf_counter()
        for gold in (gold.rpartition("####")[2].strip() for gold in golds[:: args.every]):
            for kind, answer, right in dict.fromkeys(spellings(gold)):
                earned = reward(f"It is \\boxed{{{answer}}}", {"question": "",
                                                               "answer": gold})[1]["correct"] == 1
                tried[right] += 1
                held[right] += earned == right
                wrong += [] if earned == right else [(kind, gold, answer)]
        milliseconds = (time.perf_counter() - start) / sum(tried.values()) * 1000
        print(f"{name}: {len(golds[:: args.every])} answers; right spellings that earn {held[True]} of "
              f"{tried[True]}, wrong ones that do not {held[False]} of {tried[False]}; "
              f"{milliseconds:.2f} ms each")
        for kind, number in Counter(kind for kind, *_ in wrong).most_common(args.show):
            gold, answer = next((gold, answer) for other, gold, answer in wrong if other == kind)
            print(f"    {number} x {kind}: {gold} | {answer}")


if __name__ == "__main__":
    main()
