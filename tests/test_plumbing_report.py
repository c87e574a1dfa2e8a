"""trace.html: its data are the rollouts of the evaluations, and in a real browser it shows them."""

import html
import json
import random
import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import PIL.Image
import pytest
import torch
from helpers import ROOT, SMALL, launch
from checkpoints import write

import common
from plumbing import models
from plumbing import pretrain
from plumbing import report
import tasks

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-component-update "
         "--disable-background-networking --disable-sync --enable-logging=stderr").split()
browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here to open the page in")


def page_data(file: Path) -> dict:
    return json.loads(re.search(r'json" id="trace">(.*?)</script>', file.read_text())[1])


class Dom(HTMLParser):
    """What a browser shows: of each canvas its tokens, (classes, text); the texts of other elements by class;
    attributes of <body>; lines of the console."""

    def __init__(self, page: str, console: list[str]):
        super().__init__()
        self.canvases, self.texts, self.body, self.console, self.open = [], {}, {}, console, []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        kinds = attrs.get("class", "").split()
        if tag in ("meta", "link", "input"):
            return
        self.open.append((tag, kinds, attrs.get("id", "")))
        if "canvas" in kinds:
            self.small = "small" in kinds  # the board asked, or its solution
            self.canvases += [] if self.small else [[]]
        if "t" in kinds and not self.small:
            self.canvases[-1].append([set(kinds), ""])
        if tag == "body":
            self.body = attrs

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass

    def handle_data(self, text):
        if not self.open:
            return
        tag, kinds, name = self.open[-1]
        if "t" in kinds and not self.small:
            self.canvases[-1][-1][1] += text
        for key in (tag, name, *kinds):
            self.texts[key] = self.texts.get(key, "") + text

    def shown(self) -> list[str]:
        return ["".join(text for _, text in canvas) for canvas in self.canvases]


def opened(file: Path, wish: str = "", *flags: str, probe: str = "null") -> Dom:
    """The page in Chromium; `probe` is JavaScript whose value, once all is loaded, becomes the body's
    data-probe."""
    script = f"<script>onload = () => document.body.dataset.probe = JSON.stringify({probe})</script>"
    probed = file.with_name(f"probed-{file.name}")
    probed.write_text(file.read_text().replace("</html>", f"{script}</html>"))
    profile = file.with_name(f"profile-{random.random()}")
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={profile}", *flags, "--dump-dom", f"file://{probed}{wish}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    shutil.rmtree(profile, ignore_errors=True)
    return Dom(done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line])


def evaluation(model, texts: list[str], correct: list[float], L: int, S: int, seed: int = 0) -> dict:
    """An evaluation that ended with these texts, whatever the model."""
    gen, tokenizer = torch.Generator().manual_seed(seed), model.tokenizer
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    completion = torch.tensor([row + [model.eos_id] * (L - len(row)) for row in ids])
    step = torch.stack([torch.randperm(L, generator=gen) // (L // S) for _ in texts])
    p = torch.rand(len(texts), L, generator=gen)
    values = torch.tensor(correct)
    return {"completion": completion, "revealed_at": step, "logp": p.log(), "entropy": 1 - p,
            "reward": values, "correct": values, "parse_fail": torch.zeros(len(texts))}


def settings(L: int, S: int, task: str = "sudoku") -> SimpleNamespace:
    return SimpleNamespace(L=L, S=S, block=L, model="tiny", task=task)


@pytest.fixture(scope="module")
def boards(tmp_path_factory) -> tuple[Path, dict]:
    """A page of boards: of 60 rows, row i before and after training by i % 4; a wrong one is all 1."""
    model, task = pretrain.tiny_model(layers=1, width=32), tasks.load("sudoku", chat=False, train=False)
    task.test = task.test[:60]
    before, after = ([float(i % 4 in right) for i in range(60)] for right in ((1, 3), (2, 3)))
    columns = {name: evaluation(model, [row["solution"] if right else "1" * 16 for row, right in
                                        zip(task.test, correct, strict=True)], correct, 16, 8, seed)
               for seed, (name, correct) in enumerate({"before": before, "after": after}.items())}
    file = tmp_path_factory.mktemp("boards") / "trace.html"
    report.trace(file, model, task, settings(16, 8), columns)
    return file, columns


# --------------------------------------------------------------------------------------------------- the data


def test_the_first_rows_of_each_kind_are_shown(boards):
    file, columns = boards
    data = page_data(file)
    assert list(data["counts"]) == ["became solved", "became wrong", "stayed failed", "stayed solved"]
    assert set(data["counts"].values()) == {15}
    shown = {kind: [row["row"] for row in data["rows"] if row["kind"] == kind] for kind in data["counts"]}
    assert shown == {"became solved": [2, 6, 10, 14], "became wrong": [1, 5, 9, 13],
                     "stayed failed": [0, 4, 8, 12], "stayed solved": []}
    for row in data["rows"]:
        for column, held in zip(row["columns"], columns.values(), strict=True):
            i = row["row"]
            assert column["step"] == held["revealed_at"][i].tolist()
            assert column["p"] == pytest.approx(held["logp"][i].exp().tolist(), abs=6e-4)
            assert column["entropy"] == pytest.approx(held["entropy"][i].tolist(), abs=6e-4)
            assert "".join(column["tokens"]) == column["text"]
            assert column["text"] == (row["answer"] if column["correct"] else "1" * 16)


def test_rows_that_stayed_solved_fill_up_and_one_column_has_two_kinds(tmp_path):
    model, task = pretrain.tiny_model(layers=1, width=32), tasks.load("sudoku", chat=False, train=False)
    texts = [row["solution"] for row in task.test[:20]]
    good, bad = (evaluation(model, texts, [value] * 20, 16, 8) for value in (1.0, 0.0))
    good["correct"][3] = 0.0
    report.trace(tmp_path / "a.html", model, task, settings(16, 8), {"before": good, "after": good})
    kinds = [row["kind"] for row in page_data(tmp_path / "a.html")["rows"]]
    assert kinds == ["stayed failed"] + 11 * ["stayed solved"]
    report.trace(tmp_path / "b.html", model, task, settings(16, 8), {"the model as it is": good})
    data = page_data(tmp_path / "b.html")
    assert data["counts"] == {"solved": 19, "failed": 1} and len(data["rows"]) == 12
    assert all(len(row["columns"]) == 1 for row in data["rows"])
    bad = {name: values[:4] for name, values in bad.items()}  # resumed with fewer rows
    report.trace(tmp_path / "c.html", model, task, settings(16, 8), {"before": good, "after": bad})
    assert page_data(tmp_path / "c.html")["counts"] == {
        "became solved": 0, "became wrong": 3, "stayed failed": 1, "stayed solved": 0}


def test_what_is_not_a_number_is_null(tmp_path):
    model, task = pretrain.tiny_model(layers=1, width=32), tasks.load("sudoku", chat=False, train=False)
    held = evaluation(model, [task.test[0]["solution"]], [1.0], 16, 8)
    held["logp"][0, 3], held["entropy"][0, 4], held["revealed_at"][0, 5] = torch.nan, torch.inf, 8
    report.trace(tmp_path / "page.html", model, task, settings(16, 8), {"now": held})
    column = page_data(tmp_path / "page.html")["rows"][0]["columns"][0]
    for name, null in {"p": {3, 5}, "entropy": {4, 5}}.items():
        assert {i for i, value in enumerate(column[name]) if value is None} == null


def test_tokens_add_up_to_the_text(tmp_path):
    write("llada", tmp_path / "bytes")
    bytes_ = models.load_model(str(tmp_path / "bytes"))
    numbers = pretrain.tiny_model(layers=1, width=32, task="countdown")
    for model, text in (
        (bytes_, "Zwölf  Äpfel,\n\n 日本 🙂 x\t."), (bytes_, "x"), (numbers, "3 * ( 12 - 7 )"),
    ):
        ids = model.tokenizer(text, add_special_tokens=False)["input_ids"]
        texts = report.token_texts(model.tokenizer, ids)
        assert len(texts) == len(ids) and "".join(texts) == text
    ids = bytes_.tokenizer("é!", add_special_tokens=False)["input_ids"]
    assert report.token_texts(bytes_.tokenizer, ids) == ["", "é", "!"]
    assert report.token_texts(bytes_.tokenizer, [ids[0], ids[0]]) == ["", "\ufffd\ufffd"]  # no character


def test_the_page_stays_below_300_kb_with_as_many_rows_as_fit(tmp_path):
    write("a2d-qwen3", tmp_path / "model")
    model = models.load_model(str(tmp_path / "model"))
    rows = [{"prompt": "?", "question": "<" * 100, "answer": "1"}] * 12
    task = common.Task([], rows, lambda *_: None, lambda text, row: [text, text])
    shown = {}
    for L in (256, 1024, 4096):
        held = evaluation(model, ["<é" * (L // 3)] * 12, [0.0] * 12, L, L)
        file = tmp_path / f"{L}.html"
        report.trace(file, model, task, settings(L, L), {"before": held, "after": held})
        shown[L] = len(page_data(file)["rows"])
        assert file.stat().st_size <= 300_000 or shown[L] == 1
    assert shown[256] == 12 > shown[1024] > shown[4096] == 1


def test_the_readmes_picture_is_drawn_from_a_page(boards, tmp_path):
    file = tmp_path / "board.gif"
    command = [sys.executable, ROOT / "benchmarks" / "gif.py", boards[0].parent, file]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "9 states of board 2" in said and file.stat().st_size <= 400_000
    with PIL.Image.open(file) as picture:
        assert picture.n_frames == 9 and picture.width > 600


# ------------------------------------------------------------------------------------------------------ a run


def test_a_run_shows_its_evaluations_before_and_after_also_when_resumed(folder, tmp_path, capsys):
    argv = ["--model", folder, *SMALL, "--beta", 1, "--lr", 1e-2]
    launch("egspo", *argv, "--updates", 2, "--out", tmp_path / "whole")
    launch("egspo", *argv, "--updates", 1, "--out", tmp_path / "two")
    launch("egspo", "--resume", tmp_path / "two", "--updates", 2)
    whole, two = (page_data(tmp_path / name / "trace.html") for name in ("whole", "two"))
    assert whole["rows"] == two["rows"] and whole["columns"] == ["before", "after update 2"]
    task = tasks.load("sudoku", chat=False, train=False)
    for c, path in enumerate((folder, str(tmp_path / "whole" / "model"))):
        model, rows = models.load_model(path), [task.test[row["row"]] for row in whole["rows"]]
        prompt, mask = common.encode(model, [row["prompt"] for row in rows])
        roll = common.denoise(model, prompt, mask, [], L=16, S=4, block=16, temperature=0)
        reward = common.reward_rows(model, task, roll.completion, rows)[0]
        for i, row in enumerate(whole["rows"]):
            column = row["columns"][c]
            assert column["step"] == roll.revealed_at[i].tolist() and column["reward"] == reward[i].item()
            assert column["p"] == pytest.approx(roll.logp[i].exp().tolist(), abs=2e-3)
            assert column["tokens"] == model.tokenizer.batch_decode(roll.completion[i][:, None])
    assert whole["rows"][0]["columns"][0] != whole["rows"][0]["columns"][1]
    out, page = tmp_path / "two", (tmp_path / "two" / "trace.html").read_text()
    launch("egspo", "--resume", out, "--eval_only")
    assert (out / "trace.html").read_text().replace('"eval_only":true', '"eval_only":false') == page
    (out / "before.pt").write_bytes(b"half a fi")
    capsys.readouterr()
    launch("egspo", "--resume", out, "--eval_only")
    assert "before.pt cannot be read" in capsys.readouterr().out
    (out / "before.pt").unlink()  # as a run of an older version left it
    launch("egspo", "--resume", out)
    assert page_data(out / "trace.html")["columns"] == ["after update 2"]


def test_the_model_alone_has_one_column(folder, tmp_path, capsys):
    launch("wd1", "--model", folder, *SMALL, "--eval_only", "--out", tmp_path / "eval")
    data = page_data(tmp_path / "eval" / "trace.html")
    assert data["columns"] == ["the model as it is"] and len(data["rows"]) == 12
    assert str(tmp_path / "eval" / "trace.html") in capsys.readouterr().out


def test_a_default_evaluation_is_drawn_in_a_moment(tmp_path):
    model, task = pretrain.tiny_model(layers=1, width=32), tasks.load("sudoku", chat=False, train=False)
    held = evaluation(model, ["1" * 16] * 1024, [0.0] * 1024, 16, 8)
    begin = time.process_time()
    report.trace(tmp_path / "page.html", model, task, settings(16, 8), {"before": held, "after": held})
    assert time.process_time() - begin < 3


# ---------------------------------------------------------------------------------------------- in a browser


@browser
def test_the_slider_goes_from_masks_to_the_completion(boards):
    file, columns = boards
    data = page_data(file)
    rows = sorted(data["rows"], key=lambda row: list(data["counts"]).index(row["kind"]))
    empty, half, full = (opened(file, wish) for wish in ("#step=0", "#step=4", ""))
    played = opened(file, "#step=0&play", "--virtual-time-budget=60000", probe="misspelt")
    assert ["misspelt" in line for line in played.console] == [True]  # this is how an error would be seen
    assert empty.console == half.console == full.console == []
    assert all(text == "░" * 16 for text in empty.shown()) and len(empty.shown()) == 24
    assert all("masked" in kinds for canvas in empty.canvases for kinds, _ in canvas)
    texts = [column["text"] for row in rows for column in row["columns"]]
    assert full.shown() == played.shown() == texts
    assert [half.texts["now"], full.texts["now"]] == ["before step 4 of 8", "done: 8 steps"]
    states = [column["step"] for row in rows for column in row["columns"]]
    assert half.shown() == ["".join(c if s < 4 else "░" for c, s in zip(text, step, strict=True))
                            for text, step in zip(texts, states, strict=True)]
    for row, at in zip(rows, range(0, 24, 2), strict=True):  # a board of 1s beside the solution
        for column, canvas in zip(row["columns"], full.canvases[at : at + 2], strict=True):
            wrong = ["wrong" in kinds for kinds, _ in canvas]
            assert wrong == [a != b for a, b in zip(column["text"], row["answer"], strict=True)]
            assert ["given" in kinds for kinds, _ in canvas] == [c != "0" for c in row["question"]]
    assert full.texts["b"].count("✓ solved") == full.texts["verdict"].count("reward 1") == 8


@browser
def test_pointer_keyboard_dark_and_a_phone(boards):
    probe = """(() => {
      const token = document.querySelector(".canvas:not(.small) .t"), said = [];
      const key = (element, key) => element.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
      const tip = document.getElementById("tip"), now = document.getElementById("now");
      token.dispatchEvent(new PointerEvent("pointerenter"));
      said.push(tip.textContent);
      token.parentElement.dispatchEvent(new PointerEvent("pointerleave"));
      said.push(tip.textContent);
      for (const name of ["ArrowRight", "ArrowRight"]) key(token.parentElement, name);
      said.push(tip.textContent, now.textContent);
      key(document.body, "ArrowLeft");
      said.push(now.textContent, getComputedStyle(document.body).backgroundColor);
      return said;
    })()"""
    file, columns = boards
    dom = opened(file, "", "--blink-settings=preferredColorScheme=0", probe=probe)
    first, left, second, done, before, background = json.loads(dom.body["data-probe"])
    column = page_data(file)["rows"][0]["columns"][0]
    for said, i in ((first, 0), (second, 1)):
        assert f"step {column['step'][i]}, probability {column['p'][i]:.3f}" in said
        assert f"entropy {column['entropy'][i]:.3f} nats" in said
    assert left == "" and (done, before) == ("done: 8 steps", "before step 7 of 8")
    assert max(map(int, re.findall(r"\d+", background))) < 60
    assert dom.console == []


@browser
def test_it_fits_a_phone_and_a_desk(boards, tmp_path):
    """In frames, since no browser window gets that narrow."""
    frames = "".join(f'<iframe width={width} srcdoc="{html.escape(boards[0].read_text())}"></iframe>'
                     for width in (320, 390, 500, 700, 1200))
    (tmp_path / "frames.html").write_text(f"<!doctype html><html><body>{frames}</body></html>")
    dom = opened(tmp_path / "frames.html", probe="""[...document.querySelectorAll("iframe")].map(frame =>
        [frame.contentDocument.documentElement.clientWidth, frame.contentDocument.documentElement.scrollWidth,
         frame.contentDocument.querySelectorAll(".canvas").length])""")
    found = json.loads(dom.body["data-probe"])
    assert 300 < found[0][0] <= 320 and 1180 < found[-1][0] <= 1200
    assert all(wide <= width and canvases == 48 for width, wide, canvases in found), found


@browser
def test_a_text_is_data_and_never_markup(tmp_path):
    """Completion, question, answer and drawing try to run a script, to end ours, and to load a picture."""
    write("a2d-qwen3", tmp_path / "model")
    model = models.load_model(str(tmp_path / "model"))
    evil = ("</script><script>document.title='run'</script><!--<script> &lt;b&gt; <b>{{data}}</b>\n\n"
            "<img src=x onerror=\"document.title='run'\"> `${document.title='run'}` é\u2028日")
    rows = [{"prompt": evil, "question": evil, "answer": evil}]
    task = common.Task([], rows, lambda *_: None, lambda text, row: [evil])
    held = evaluation(model, [evil], [0.0], 512, 256)
    held["revealed_at"][0, 300:] = 256  # behind the end
    file = tmp_path / "page.html"
    report.trace(file, model, task, settings(512, 256, "gsm8k"), {evil: held})
    assert page_data(file)["rows"][0]["columns"][0]["text"] == evil
    dom, empty = opened(file), opened(file, "#step=0")
    assert dom.console == empty.console == [] and "run" not in dom.texts["title"]
    assert dom.texts["asked"] == evil and evil in dom.texts["verdict"]
    assert dom.shown()[0].startswith(evil) and set(dom.shown()[0][len(evil) :]) == {"∎", "·"}
    assert dom.shown()[0].count("·") == evil.count("·") + 212
    assert set("".join(empty.shown()[0].split())) == {"░"}
    assert empty.shown()[0].count("\n") == 2  # line breaks stay where they are
    unsafe = tmp_path / "unsafe.html"  # and this test would have seen it
    unsafe.write_text(file.read_text().replace("\\u003c", "<"))
    broken = opened(unsafe)
    assert "run" in broken.texts["title"]


@browser
def test_an_expression_is_a_row_of_tokens_and_what_it_comes_to(tmp_path):
    model = pretrain.tiny_model(layers=1, width=32, task="countdown")
    recipe, numbers = tasks.find("countdown").TINY, "3 + 7 + 2"
    row = recipe.row({"numbers": [3, 7, 2], "target": 13})
    task = common.Task([], [row], recipe.reward, recipe.draw)
    held = evaluation(model, [numbers], [0.0], 8, 8)
    file = tmp_path / "page.html"
    report.trace(file, model, task, settings(8, 8, "countdown"), {"now": held})
    dom = opened(file)
    assert dom.shown()[0].rstrip("∎") == numbers and dom.console == []
    assert dom.texts["verdict"].endswith("reward 0 · is 12, not 13") and row["question"] == dom.texts["asked"]


@browser
def test_a_page_of_words_opens_in_a_moment(tmp_path):
    """L 256, a dozen rows, two columns, until everything is laid out."""
    write("a2d-qwen3", tmp_path / "model")
    model = models.load_model(str(tmp_path / "model"))
    rows = [{"prompt": "?", "question": "How many? " * 20, "answer": "1"}] * 12
    task = common.Task([], rows, lambda *_: None, lambda text, row: [text, text])
    held = evaluation(model, [" so many words" * 15] * 12, [0.0] * 12, 256, 128)
    file = tmp_path / "page.html"
    report.trace(file, model, task, settings(256, 128, "gsm8k"), {"before": held, "after": held})
    dom = opened(file, probe="[document.documentElement.scrollHeight, performance.now()]")
    height, milliseconds = json.loads(dom.body["data-probe"])
    print(f"{milliseconds:.0f} ms, {file.stat().st_size} bytes")
    assert height > 2000 and milliseconds < 5000 and dom.console == []
