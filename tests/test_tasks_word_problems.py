"""Word problems: their answers, found again by a reader that knows the sentences; parts that share nothing;
and the same problems in every run."""

import json
import re
import subprocess
import sys

import pytest
from helpers import ROOT, global_random_states

from tasks import load
from tasks.answers import BOXED
from tasks.gsm8k import gsm8k_reward
from tasks.word_problems import PARTS, TASK, part_of, problems

MORE = re.compile(r" (more|buys|finds|gets|given|brings)\b| takes \d+ more")
FEWER = re.compile(r" (fewer|loses|sells|gives \d|drops|throws)\b| gives \d+ | takes \d+ of them")


def solve(question: str) -> tuple[list[int], str]:
    """The numbers of things after each sentence, and whose they are in the end."""
    *told, asked = re.findall(r"[^.?]+[.?]", question)
    owner, values = re.search(r"\b(?!There|How)([A-Z][a-z]+)(?:'s| has| owns| starts)", told[0])[1], []
    for sentence in told:
        (number,) = re.findall(r"\d+", sentence)
        if not values:
            values.append(int(number))
            continue
        more, fewer = bool(MORE.search(sentence)), bool(FEWER.search(sentence))
        assert more != fewer, sentence
        if than := re.search(r"([A-Z][a-z]+) has \d+ (?:more|fewer) \w+ than ([A-Z][a-z]+)\.", sentence):
            assert than[2] == owner
            owner = than[1]
        values.append(values[-1] + (1 if more else -1) * int(number))
    assert f" {owner} have" in asked
    return values, owner


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_the_answers_are_right(steps):
    rows = problems("train", steps, 2000)
    for row in rows:
        values, _ = solve(row["question"])
        assert len(values) == steps + 1 and str(values[-1]) == row["answer"] and row["steps"] == steps
        assert all(1 <= value <= 10 for value in values)
    share = [sum(row["answer"] == str(n) for row in rows) / len(rows) for n in range(1, 11)]
    assert min(share) > 0.06 and max(share) < 0.14  # what a guess earns


def test_rows_and_reward_are_those_of_gsm8k():
    task = load("word_problems", chat=True)
    for row in task.test[:50]:
        assert row["prompt"] == f"{row['question']}\n{BOXED}" and row["steps"] == 1
        assert gsm8k_reward(TASK.right(row), row)[0] == 1.25
        assert task.reward(f"So it is \\boxed{{{int(row['answer']) + 1}}}.", row)[0] == 0.25
    assert task.reward is gsm8k_reward


def test_the_parts_share_no_question_and_are_always_the_same():
    before = global_random_states()
    problems.cache_clear()
    parts = {part: [row["question"] for row in problems(part)] for part in PARTS}
    assert {part: len(set(questions)) for part, questions in parts.items()} == PARTS
    for part, questions in parts.items():
        assert all(part_of(question) == part for question in questions)
    assert global_random_states() == before  # nothing was drawn from what others draw from
    first = problems("train")[0]
    problems.cache_clear()
    assert problems("train")[0] == first
    validation = load("word_problems", chat=True, train=False, held_out="validation").test
    assert [row["question"] for row in validation] == parts["validation"]


def test_harder_problems_come_as_a_file(tmp_path):
    script = [sys.executable, "-m", "tasks.word_problems"]
    done = subprocess.run([*script, "3", "40", "train"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert [json.loads(line) for line in done.stdout.splitlines()] == problems("train", 3, 40)
    (tmp_path / "three.jsonl").write_text(done.stdout)
    task = load("word_problems", chat=True, data=str(tmp_path / "three.jsonl"))
    assert len(task.train) == 36 and len(task.test) == 4 and all(row["steps"] == 3 for row in task.train)
    plain = tmp_path / "plain.jsonl"  # rows of one's own need no steps
    plain.write_text('{"question": "Who?", "answer": "3"}\n{"question": "What?", "answer": "4"}\n')
    assert load("word_problems", chat=True, data=str(plain)).train[0]["answer"] == "3"
    for wrong in (["3", "40"], ["0", "40", "all"]):
        done = subprocess.run([*script, *wrong], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 2 and done.stderr.count("\n") == 1 and "error: " in done.stderr
