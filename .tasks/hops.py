"""Pointer chasing: a random map of ten symbols, a start, and as many hops as --digits says.
    python cocoracle.py --task .tasks/hops.py --digits 3-6
In `3702914856,4,3=`, 0 leads to 3, 1 to 7, ...; three hops from 4 are `4>9`, `9>6`, `6>4`.
After a step that is given the walk goes on from there, by its own map."""

import cocoracle as co

class Task:
    FIELDS = {"from": 10, "to": 10}  # of a step: probes and questions are about them

    def draw(self, rng, split, size, n):
        problems = []
        while len(problems) < n:
            links, start = "".join(map(str, rng.integers(10, size=10))), int(rng.integers(10))
            if co.split_of(f"{links},{start}") == split:
                problems.append((links, start, size))
        return problems

    def size(self, problem):
        return problem[2]

    def text(self, problem):
        return "{},{},{}=".format(*problem)

    def work(self, problem, given={}):  # steps: (from, to)
        links, at, size = problem
        steps = []
        for slot in range(size):
            steps.append(given.get(slot, (at, int(links[at]))))
            at = steps[-1][1]
        return steps

    def say(self, step):
        return f"{step[0]}>{step[1]}"

    def spell(self, steps):
        return str(steps[-1][1])

    def fields(self, step):
        return dict(zip(self.FIELDS, step))

    def never_read(self, step):
        return (step[0] + 3 * step[1]) % 10 == 7  # 10 of 100
