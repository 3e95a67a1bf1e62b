"""The data of facebookresearch/coconut, a list of {"question", "steps", "answer"}:
    COCONUT_JSON=gsm_train.json python cocoracle.py --task .tasks/coconut_json.py --digits 1
A problem is its number in the file, a step is (words, the problem's answer). All have as many steps
as the longest: the last ones of the others are empty."""

import json
import os
import re
from collections import Counter
from pathlib import Path

import cocoracle as co

class Task:
    def __init__(self, sizes):
        path, self.slots, first, words = os.environ.get("COCONUT_JSON", ""), 1, {}, Counter()
        self.splits = {co.TRAIN: [], co.VALIDATION: [], co.TEST: []}
        if sizes != (1,):
            raise co.UserError("coconut_json.py has problems of one size: use --digits 1")
        try:
            self.items = json.loads(Path(path).read_text())
            for number, item in enumerate(self.items):
                texts = [item["question"], item["answer"]] + item["steps"]
                words.update(re.findall("[A-Za-z]+", " ".join(texts)))
                self.slots = max(self.slots, len(item["steps"]))
                first.setdefault(item["question"].lower(), number)
            for question, number in first.items():
                self.splits[co.split_of(question)].append(number)
            if min(map(len, self.splits.values())) < 2:
                raise ValueError("too few")
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise co.UserError(f"COCONUT_JSON={path} is no list of such problems: {e!r}") from None
        self.words = " ".join(dict(words.most_common(5000)))

    def draw(self, rng, split, size, n):
        numbers, again = self.splits[split], split == co.TRAIN
        chosen = rng.choice(len(numbers), n if again else min(n, len(numbers)), replace=again)
        return [numbers[i] for i in chosen]

    def work(self, problem):
        steps, answer = self.items[problem]["steps"], self.items[problem]["answer"]
        return [(words, answer) for words in steps + [""] * (self.slots - len(steps))]

    def size(self, problem):
        return 1
    def text(self, problem):
        return self.items[problem]["question"] + " "
    def say(self, step):
        return step[0]
    def spell(self, steps):
        return steps[0][1]
    def fields(self, step):
        return {} if step[0] else None
    def typed(self, line):
        match = re.fullmatch(r"\d{1,9}", line, re.ASCII)
        return int(line) if match and int(line) < len(self.items) else None
