r"""How people and models spell numbers and mathematics, brought to one spelling.

    plain(r"\textbf{1,\!450}\,\text{cm}^2")     ["1450", " ", "\\text{cm}", "^", "2"]
    quantity(plain("$1.45M"))                   Fraction(1450000)

All is read from left to right, token by token: the time is linear in the length of the text, whatever it is.
"""

import functools
import re
import unicodedata
from fractions import Fraction

SPECIAL = re.compile(r"<\|\w{1,40}\|>")  # of a tokenizer: it may end an answer, and parts what it stands in
TOKEN = re.compile(r"\\[a-zA-Z]+|\\.|[a-zA-Z]+|[0-9]+|\s+|.", re.DOTALL)

# Commands and signs that mean the same, or nothing.
SAME = {"cdot": "*", "times": "*", "ast": "*", "div": "/", "dfrac": "\\frac", "tfrac": "\\frac",
        "cfrac": "\\frac", "nicefrac": "\\frac", "sfrac": "\\frac", "dbinom": "\\binom",
        "tbinom": "\\binom",
        "lbrace": "\\{", "rbrace": "\\}", "lbrack": "[", "rbrack": "]", "langle": "(",
        "rangle": ")", "imath": "i", "dollar": "$", "textdollar": "$", "pounds": "$", "euro": "$",
        "textdegree": "\\degree", "leq": "\\le", "leqslant": "\\le", "geq": "\\ge", "geqslant": "\\ge",
        "neq": "\\ne", "bar": "\\overline", "varnothing": "\\emptyset", "lt": "<", "gt": ">",
        "bigcup": "\\cup", "vee": "\\lor", "wedge": "\\land", "texttimes": "*", "textdiv": "/",
        "newline": "\\\\"}
LOOK = {"displaystyle", "textstyle", "scriptstyle", "left", "right", "mleft", "mright", "middle", "limits",
        "tiny", "scriptsize", "footnotesize", "small", "normalsize", "large", "Large", "LARGE", "huge",
        "Huge", "bf", "rm", "it", "sf", "tt", "big", "Big", "bigg", "Bigg", "bigl", "bigr",
        "Bigl", "Bigr", "biggl", "biggr", "Biggl",
        "Biggr", "boldmath", "bfseries", "itshape"}
SPACE = {"quad", "qquad", "thinspace", "medspace", "thickspace", "enspace", "space", "nobreakspace"}
TEXT = {"text", "textbf", "textit", "textrm", "textsf", "texttt", "textnormal", "textsc", "mbox", "hbox",
        "emph", "mathrm", "mathsf", "mathtt", "operatorname"}
FONT = {"mathbf", "mathit", "mathnormal", "boldsymbol", "bm", "pmb", "underline", "fbox", "boxed",
        "ensuremath"}
# What becomes of the next groups in braces.
GROUPS = dict.fromkeys(TEXT, ["text"]) | dict.fromkeys(FONT, ["bare"]) | {
    "color": ["skip", "bare"], "textcolor": ["skip", "bare"], "colorbox": ["skip", "bare"],
    "hspace": ["skip"], "vspace": ["skip"], "phantom": ["skip"], "hphantom": ["skip"],
    "vphantom": ["skip"], "tag": ["skip"], "label": ["skip"]}
WRAPPERS = [("**", "**"), ("__", "__"), ("*", "*"), ("_", "_"), ("`", "`"), ('"', '"'), ("'", "'"),
            ("“", "”"), ("<b>", "</b>"), ("<i>", "</i>"), ("<strong>", "</strong>"), ("<em>", "</em>"),
            ("<u>", "</u>"), ("<mark>", "</mark>")]
SIGNS = {"−": "-", "–": "-", "‒": "-", "—": "-", "﹣": "-", "×": "*", "·": "*", "⋅": "*", "∙": "*", "•": "*",
         "∗": "*", "⨯": "*", "✕": "*", "✖": "*", "÷": "/", "∕": "/", "⁄": "/", "π": "\\pi ",
         "∞": "\\infty ", "∪": "\\cup ", "⋃": "\\cup ", "∩": "\\cap ", "∨": "\\lor ", "∧": "\\land ",
         "∖": "\\setminus ", "√": "\\surd ", "≤": "\\le ", "⩽": "\\le ", "≥": "\\ge ",
         "⩾": "\\ge ", "≠": "\\ne ", "≈": "\\approx ", "±": "\\pm ", "∈": "\\in ", "ℝ": "\\mathbb{R}",
         "∅": "\\emptyset ", "°": "\\degree ", "º": "\\degree ", "…": "...", "⟨": "(", "⟩": ")",
         "θ": "\\theta ", "α": "\\alpha ", "β": "\\beta ", "λ": "\\lambda ", "\u200b": "", "\u2061": "",
         "\u2062": "", "\ufeff": "", "′": "'", "。": "."}
RAISED = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+|[₀₁₂₃₄₅₆₇₈₉]+")  # no letters: ª, ₐ


@functools.lru_cache(1024)
def spelled(character: str) -> str:
    """A sign that is not ASCII as LaTeX; what has no such spelling stays as it is."""
    if character in SIGNS:
        return SIGNS[character]
    form, _, parts = unicodedata.decomposition(character).partition(" ")
    kind = unicodedata.category(character)
    if form == "<fraction>" and kind == "No" and not parts.endswith("2044"):
        above, below = "".join(chr(int(part, 16)) for part in parts.split()).split("⁄")
        return rf"\frac{{{above}}}{{{below}}}"
    if form == "<wide>" and not character.isalnum():  # （＋）, of a Chinese keyboard
        return unicodedata.normalize("NFKC", character)
    return {"Sc": "$", "Zs": " "}.get(kind, character)  # a currency; a space


def plain(text: str) -> list[str]:
    """The tokens of a text in one spelling: without wrappers, fonts, colours and sizes; one sign for minus
    and times; `$` for currencies and for what encloses a formula; digits in groups of three joined; 1.8e1 as
    1.8*10^{1}. Words of \\text and the like stay one token. A comma alone joins nothing: it may be a list."""
    parts = SPECIAL.split(text)
    text = "".join(parts).strip() if sum(1 for part in parts if part.strip()) < 2 else text.strip()
    for _ in range(8):  # wrappers in wrappers; more than that nobody writes
        for before, after in WRAPPERS:
            if len(text) > len(before + after) and text.startswith(before) and text.endswith(after):
                text = text[len(before) : -len(after)].strip()
    if not text.isascii():
        text = RAISED.sub(raised, text)
        text = "".join(c if c.isascii() else spelled(c) for c in text)
    return arranged(joined(TOKEN.findall(text)))


def raised(signs: re.Match) -> str:
    """10⁻¹⁹ as 10^{-19}, 52₈ as 52_{8}."""
    mark = "_" if signs[0][0] in "₀₁₂₃₄₅₆₇₈₉" else "^"
    return f"{mark}{{{unicodedata.normalize('NFKC', signs[0])}}}"


def joined(tokens: list[str]) -> list[str]:
    """Digits that belong to one number as one token, and 1.8e1 as 1.8*10^{1}."""
    out, i = [], 0
    while i < len(tokens):
        token, i = tokens[i], i + 1
        if token.isdigit() and token.isascii() and len(token) <= 3 and not (  # nor are they decimals
                out[-1:] == ["."] and out[-2:-1] and out[-2].isdigit()):
            while (end := separator(tokens, i)) > i and three_digits(tokens, end) and not (
                    tokens[i].isspace() and tokens[end + 1 : end + 2] == ["/"]):  # 18 100/200
                token, i = token + tokens[end], end + 1
        out.append(token)
        if token in ("e", "E") and out[-2:-1] and out[-2].isdigit():
            sign = tokens[i] if tokens[i : i + 1] in (["-"], ["+"]) else ""
            power, after = (tokens[i + len(sign) : i + len(sign) + 2] + ["", ""])[:2]
            if power.isdigit() and len(power) <= 2 and not after.isalnum():
                out[-1:] = ["*", "10", "^", "{", *sign.replace("+", ""), power, "}"]
                i += len(sign) + 1
    return out


def three_digits(tokens: list[str], i: int) -> bool:
    return i < len(tokens) and len(tokens[i]) == 3 and tokens[i].isdigit()


def separator(tokens: list[str], i: int) -> int:
    r"""Where what may stand between groups of three digits ends, from i on: `,\!`, `{,}` or one space of any
    kind. i itself if nothing of this is there: a comma alone or with a space makes a list."""
    if tokens[i : i + 3] == ["{", ",", "}"]:
        end = i + 3
        while end < len(tokens) and end < i + 6 and (tokens[end] in ("\\!", "\\,") or tokens[end].isspace()):
            end += 1
        return end
    end, narrow = i, False
    while end < len(tokens) and end < i + 4 and (tokens[end] in (",", "\\!") or tokens[end].isspace()):
        narrow |= tokens[end] == "\\!"
        end += 1
    if narrow:
        return end
    one = tokens[i : i + 1]
    spaces = ("\\,", "\\;", "\\:", "\\ ", "~", "\\thinspace")
    return i + 1 if one and (one[0] in spaces or one[0].isspace() and len(one[0]) == 1) else i


def arranged(tokens: list[str]) -> list[str]:
    """Commands that change nothing left out, arguments of \\frac and \\sqrt in braces."""
    out, stack = [], []  # stack: for each open brace what it is, where it begins, arguments due after it
    groups, due, i = [], 0, 0  # what the next groups are; arguments due of \frac or \sqrt
    over = {}  # by depth: where {a \over b} is divided, and the command that it stands for
    closes = closing(tokens)
    while i < len(tokens):
        token, i = tokens[i], i + 1
        name = token[1:] if token[0] == "\\" and token[1:].isalpha() else ""
        if token.isspace() or token in ("\\,", "\\;", "\\:", "\\ ", "~") or name in SPACE:
            out += [" "] if out[-1:] not in ([" "], ["^"]) and not due else []
            continue
        if token == "\\!" or name in LOOK:
            i += tokens[i : i + 1] == ["."] and name in ("left", "right")  # \left.
            continue
        if token == "{":
            kind = groups.pop(0) if groups else "argument" if due else "keep"
            stack.append((kind, len(out), due - (kind == "argument")))
            due = 0
            out += ["{"] if kind in ("keep", "argument") else []
            continue
        if token == "}":
            at = over.pop(len(stack), None)
            kind, start, due = stack.pop() if stack else ("keep", len(out), 0)
            if at:
                fraction(out, start + (kind in ("keep", "argument")), *at)
            inside = out[start:]
            if kind == "skip":
                del out[start:]
            elif kind == "bare" and (len(inside) > 1 or out[start - 1 : start] in (["^"], ["_"])):
                out[start:] = ["{", *inside, "}"]
            elif kind == "text":
                formula = any(token[0] == "\\" for token in inside)  # \\mathrm{\\pi}
                out[start:] = inside if formula else worded("".join(inside))
            elif kind == "keep" and inside == ["{", "\\circ"]:
                out[start:] = ["\\circ"]
            elif kind in ("keep", "argument"):
                out.append("}")
            if due and kind in ("bare", "text"):  # \frac\mathbf{1}{2}
                out[start:] = ["{", *out[start:], "}"]
                due -= 1
            continue
        groups = []
        if name in ("begin", "end") and tokens[i : i + 1] == ["{"] and tokens[i + 2 : i + 3] == ["}"]:
            out.append("".join(tokens[i - 1 : i + 3]))
            i += 3
            continue
        if name in GROUPS:
            groups = list(GROUPS[name])
            continue
        if name in ("over", "choose") and len(stack) not in over:
            over[len(stack)] = len(out), {"over": "\\frac", "choose": "\\binom"}[name]
            continue
        if token == "\\\\" and tokens[i : i + 1] == ["["] and tokens[i + 2 : i + 4] == ["pt", "]"]:
            i += 4  # \\[2pt]
        token = SAME.get(name, "$" if token in ("\\$", "\\(", "\\)", "\\[", "\\]") else token)
        if token in ("\\%", "\\#", "\\&", "\\_", "\\*"):
            token = token[1]
        if token == "\\degree":
            out += ["^", "\\circ"] if out[-1:] != ["^"] else ["\\circ"]
        elif token in ("\\frac", "\\binom", "\\sqrt"):
            out.append(token)
            if token == "\\sqrt" and tokens[i : i + 1] == ["["]:
                end = next((k for k in range(i, min(i + 8, len(tokens))) if tokens[k] == "]"), i)
                out += tokens[i : end + 1]
                i = end + 1
            due = 1 if token == "\\sqrt" else 2
        elif token in ("sqrt", "\\surd") and closes.get(i + (tokens[i : i + 1] == [" "])):  # sqrt(2)
            i += tokens[i] == " "
            out.append("\\sqrt")
            tokens[i], tokens[closes[i]], due = "{", "}", 1
        elif token == "\\surd":  # the sign: its argument is the whole number
            while i < len(tokens) and tokens[i].isspace():
                i += 1
            whole = i < len(tokens) and tokens[i].isdigit()
            out += ["\\sqrt", "{", tokens[i], "}"] if whole else ["\\sqrt"]
            i += whole
            due = 0 if whole else 1
        elif due:  # \frac12: the first character
            first = token if token[0] == "\\" else token[0]
            out += ["{", first, "}"]
            tokens[i - 1] = token[len(first) :]
            i -= bool(tokens[i - 1])
            due -= 1
        else:
            if token == "^" and out[-1:] == [" "] and len(out) > (stack[-1][1] if stack else 0):
                out.pop()
            out.append(token)
    if 0 in over:
        fraction(out, 0, *over[0])
    return out


def closing(tokens: list[str]) -> dict[int, int]:
    """Where each ( that is closed is closed."""
    found, stack = {}, []
    for i, token in enumerate(tokens):
        if token == "(":
            stack.append(i)
        elif token == ")" and stack:
            found[stack.pop()] = i
    return found


def fraction(out: list[str], start: int, at: int, command: str):
    r"""Make \frac{1}{2} of {1 \over 2}, \binom{5}{2} of {5 \choose 2}: from `start` on, divided at `at`."""
    out[start:] = [command, "{", *out[start:at], "}", "{", *out[at:], "}"]


def worded(words: str) -> list[str]:
    r"""The tokens of \text{...}: words are one token. No words: what has no letter, and the power of cm^2."""
    return [token for part in re.split(r"(\^(?:\{-?[0-9]\}|-?[0-9]))", words) for token in (
        [f"\\text{{{part}}}"] if any(map(str.isalpha, part)) else TOKEN.findall(part))]


def trimmed(tokens: list[str]) -> list[str]:
    """Without spaces and punctuation at the ends, nor braces around all."""
    start, end = 0, len(tokens)
    while True:
        while start < end and tokens[start] in (" ", "$"):
            start += 1
        while end > start and tokens[end - 1] in (" ", "$", ".", ",", ";", "\\\\"):
            end -= 1
        if end - start < 2 or tokens[start] != "{" or tokens[end - 1] != "}" or start > 4:
            return tokens[start:end]
        depth = 0
        for last in range(start, end):
            depth += {"{": 1, "}": -1}.get(tokens[last], 0)
            if depth == 0:
                break
        if last < end - 1:
            return tokens[start:end]
        start, end = start + 1, end - 1


# ------------------------------------------------------------------------------------------------ quantities

POWERS = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12,
          "quadrillion": 10**15, "lakh": 10**5, "crore": 10**7, "mn": 10**6, "bn": 10**9, "dozen": 12,
          "ten": 10, "halves": Fraction(1, 2), "quarter": Fraction(1, 4)}
POWERS |= {word: Fraction(1, n) for n, word in enumerate(
    ("third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth"), 3)}
LETTERS = {"k": 10**3, "K": 10**3, "M": 10**6, "B": 10**9}  # not m: metres
# Words that make another number of what stands before them, or a second one: never a unit.
NO_UNIT = set("""and or nor not plus minus times over divided by point to than squared cubed factorial half
    union between pi except without mod modulo if unless score gross grand thou mil percentage
    zero one two three four five six seven eight nine ten eleven twelve
    twenty thirty forty fifty sixty seventy eighty ninety""".split())
ORDINAL = re.compile(r"(?:.{0,20}(?:dred|sand|llion|teen|tie)|twelf|eleven)ths?")
CODES = set("USD EUR GBP JPY INR CAD AUD CNY RMB CHF HKD NZD SGD MXN BRL KRW Rs RS".split())
UNIT_POWERS = {"2", "3", "{2}", "{3}", "-1", "-2", "-3", "{-1}", "{-2}", "{-3}"}
COUNTRIES = {"US", "A", "C", "CA", "AU", "HK", "NZ", "S"}  # before a $ alone


def quantity(tokens: list[str], letters: bool = True, counted: str = "") -> Fraction | None:
    """The number that these tokens are, with a unit behind it or none, exactly; None if they are no number,
    or may be another. letters: 18k is 18000. counted: what is asked for ("dozens"), so a unit."""
    i, sign, size = 0, "", len(tokens)
    while i < size and (tokens[i] in (" ", "$", "(", "{") or tokens[i] in "+-" and not sign
                        or prefix(tokens, i)):
        sign = tokens[i] if tokens[i] in "+-" else sign
        i += 1 + (tokens[i] == "Rs" and tokens[i + 1 : i + 2] == ["."])
    value, i = number(tokens, i)
    if value is None:
        return None
    attached, words = True, 0
    while i < size:
        token = tokens[i]
        word = in_text(token)
        i += 1
        if token == " ":
            attached = False
        elif word and all(c.isalpha() or c in " .,-/%'()" for c in word):
            for each in re.findall("[a-zA-Z]+", word):
                value = scaled(value, each, counted, words, letters, True)
                words += 1
        elif token.isalpha() and token.isascii():
            single = len(token) == 1 and token not in LETTERS and tokens[i - 2 : i - 1] != ["\\circ"]
            if single and (attached or token in "xyzine"):  # 18x
                return None
            if len(token) == 1 and token in LETTERS and not letters:
                return None
            value = scaled(value, token, counted, words, letters, False)
            words += 1
        elif token == "^" and tokens[i : i + 1] == ["\\circ"]:
            i += 1
        elif token == "^" and words and i < size:
            power = [end for end in range(i + 1, i + 5) if "".join(tokens[i:end]) in UNIT_POWERS]
            if not power:
                return None
            i = power[0]
        elif token in ("\\frac", "*") and any(map(in_text, tokens[i : i + 1 + (token != "*")])):
            pass  # \frac{\text{km}}{\text{h}}
        elif token == "." and tokens[i : i + 1] == ["."] or token not in (*".,'\"%/()${}", "\\circ", "\\\\"):
            return None
        if value is None:
            return None
    return -value if sign == "-" else value


def opened(tokens: list[str]) -> list[str]:
    r"""The tokens with those of every \text{} that holds a digit: \text{18 apples}."""
    return [part for token in tokens for part in (
        TOKEN.findall(in_text(token)) if re.search("[0-9]", in_text(token)) else [token])]


def prefix(tokens: list[str], i: int) -> bool:
    """Whether a currency's letters stand before an amount: US$18, USD 18, Rs. 18."""
    if tokens[i] in COUNTRIES:
        return tokens[i + 1 : i + 2] == ["$"]
    code = in_text(tokens[i]).strip() or tokens[i]
    return code in CODES and any(token.isdigit() for token in tokens[i + 1 : i + 4])


def in_text(token: str) -> str:
    r"""What is in the braces of \text{...}, in one token; "" for any other token."""
    return token[6:-1] if token.startswith("\\text{") else ""


def scaled(value: Fraction, word: str, counted: str, words: int, letters: bool,
           text: bool) -> Fraction | None:
    """`value` of what `word` says: itself for a unit; None if it may be another number."""
    lower = word.lower()
    if lower in NO_UNIT or ORDINAL.fullmatch(lower):
        return None
    stem = lower if lower in POWERS else lower.removesuffix("s")
    if stem in POWERS and lower.removesuffix("s") != counted.removesuffix("s"):
        return value * POWERS[stem]
    if letters and word in LETTERS and not words:
        return value * LETTERS[word]
    return value


def number(tokens: list[str], i: int, depth: int = 0) -> tuple[Fraction | None, int]:
    r"""The number that begins at i and where it ends: 1,450.5, .5, 36/2, \frac{36}{2}, 18\frac{1}{2}, 18 1/2,
    0.1\overline{6}, 1.8*10^{1}. None if there is none."""
    whole, i = decimal(tokens, i)
    fraction, end = ratio(tokens, i + (tokens[i : i + 1] == [" "]) if whole is not None else i, depth)
    if fraction is not None and whole is not None:  # a mixed number
        mixed = whole.denominator == 1 and 0 <= fraction < 1 and tokens[i - 1].isdigit()
        return (whole + fraction, end) if mixed else (None, i)
    if fraction is not None:
        value, i = fraction, end
    elif whole is not None:
        value = whole
        slash = i + (tokens[i : i + 1] == [" "])
        if tokens[slash : slash + 1] == ["/"]:
            below, end = decimal(tokens, slash + 1 + (tokens[slash + 1 : slash + 2] == [" "]))
            if below is not None:
                if not below:
                    return None, i
                value, i = value / below, end
    else:
        return None, i
    times = i + (tokens[i : i + 1] == [" "])
    if tokens[times : times + 1] in (["*"], ["x"]):
        rest = [token for token in tokens[times + 1 : times + 9] if token != " "]
        if rest[:2] == ["10", "^"]:
            brace = rest[2:3] == ["{"]
            rest = rest[2 + brace :]
            minus = rest[:1] == ["-"]
            power = rest[minus] if len(rest) > minus and rest[minus].isdigit() else ""
            if 1 <= len(power) <= 2 and (not brace or rest[minus + 1 : minus + 2] == ["}"]):
                value *= Fraction(10) ** (-int(power) if minus else int(power))
                left = 3 + brace * 2 + minus  # tokens of 10^{-3} that are no spaces
                i = times + 1
                while left:
                    left -= tokens[i] != " "
                    i += 1
    return value, i


def decimal(tokens: list[str], i: int, commas: bool = True) -> tuple[Fraction | None, int]:
    """A number without a fraction bar that begins at i, and where it ends."""
    start, digits = i, ""
    if i < len(tokens) and tokens[i].isdigit() and tokens[i].isascii():
        digits, i = tokens[i], i + 1
        if commas and len(digits) <= 3 and digits[0] != "0":
            while tokens[i : i + 1] == [","] and i + 1 < len(tokens) and tokens[i + 1].isdigit() and (
                    len(tokens[i + 1]) == 3):
                digits, i = digits + tokens[i + 1], i + 2
    after, repeated = "", ""
    if tokens[i : i + 1] == ["."]:
        k = i + 1
        if k < len(tokens) and tokens[k].isdigit() and tokens[k].isascii():
            after, k = tokens[k], k + 1
        block = [token for token in tokens[k : k + 5] if token != " "]
        if block[:1] in (["\\overline"], ["\\dot"]) and block[1:2] == ["{"] and block[3:4] == ["}"]:
            repeated, closing = block[2], "}"
        elif block[:1] in (["\\overline"], ["\\dot"]) and len((block[1:2] or [""])[0]) == 1:
            repeated, closing = block[1], block[1]
        elif tokens[k : k + 1] == ["("] and tokens[k + 2 : k + 3] == [")"] and (
                not after or not digits.strip("0")):
            repeated, closing = tokens[k + 1], ")"
        if repeated.isdigit() and repeated.isascii():
            while tokens[k] != closing or tokens[k] == "\\overline":
                k += 1
            k += 1
            dotted = tokens[k : k + 1 + (k < len(tokens) and tokens[k].isdigit()) + 3]
            if block[0] == "\\dot" and dotted[-4:-2] == ["\\dot", "{"] and dotted[-2].isdigit():
                repeated += "".join(dotted[:-4]) + dotted[-2]  # 0.\dot{1}4285\dot{7}
                k += len(dotted)
            if k < len(tokens) and tokens[k].isdigit():
                return None, start
        else:
            repeated = ""
        if after or repeated:
            i = k
    if not digits and not after and not repeated or len(digits + after + repeated) > 400:
        return None, start
    value = Fraction(int((digits or "0") + after), 10 ** len(after))
    if repeated:
        value += Fraction(int(repeated), 10 ** len(after) * (10 ** len(repeated) - 1))
    return value, i


def ratio(tokens: list[str], i: int, depth: int) -> tuple[Fraction | None, int]:
    r"""A \frac{}{} that begins at i; or, after a space, a/b: the fraction of a mixed number."""
    if tokens[i : i + 2] == ["\\frac", "{"] and depth < 3:
        parts, k = [], i + 1
        for _ in range(2):
            if tokens[k : k + 1] != ["{"]:
                return None, i
            k += 1
            while k < len(tokens) and tokens[k] in (" ", "$"):
                k += 1
            minus = tokens[k : k + 1] == ["-"]
            part, k = number(tokens, k + minus, depth + 1)
            while k < len(tokens) and tokens[k] in (" ", "$"):
                k += 1
            if part is None or tokens[k : k + 1] != ["}"]:
                return None, i
            parts.append(-part if minus else part)
            k += 1
        return (parts[0] / parts[1], k) if parts[1] else (None, i)
    above, slash, below = (tokens[i : i + 3] + ["", "", ""])[:3]
    if tokens[i - 1 : i] == [" "] and above.isdigit() and slash == "/" and below.isdigit():
        return (Fraction(int(above), int(below)), i + 3) if int(below) else (None, i)
    return None, i
