"""HumanEval: write the body of a function; its tests are not shown. For evaluation only.

    row     {"prompt": "Complete this function: ...", "tests": ["assert candidate(1) == 2"], ...}
    answer  ```python
            def up(x):
                return x + 1
            ```
"""

from tasks import Recipe, hub
from tasks.answers import draw_text
from tasks.code import code_flawed, code_reward, code_right, code_row

TASK = Recipe(code_row, code_reward, draw_text, flawed=code_flawed, right=code_right, parallel=True,
              sources={
    "test": lambda: hub("openai/openai_humaneval", split="test")})
