"""MBPP: write a function; some of its tests are shown.

    row     {"prompt": "Write a function to add. ...", "head": "...", "tests": ["assert add(1, 2) == 3"], ...}
    answer  ```python
            def add(a, b):
                return a + b
            ```
"""

from tasks import Recipe, hub
from tasks.answers import draw_text
from tasks.code import code_flawed, code_reward, code_right, code_row

TASK = Recipe(code_row, code_reward, draw_text, flawed=code_flawed, right=code_right, parallel=True,
              sources={
    "train": lambda: hub("google-research-datasets/mbpp", "full", split="train"),
    "test": lambda: hub("google-research-datasets/mbpp", "full", split="test")})
