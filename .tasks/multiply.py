"""n-by-n-digit multiplication as at school, into one row of digits; n is --digits.
    python cocoracle.py --task .tasks/multiply.py --digits 2 --explain 1 --given 3 \\
        --read-layer 1 --train-text 600 --train-mixed 0 --train-latent 4500
3 digits: --explain 3, and 800, 0 and 12000 such steps; 4: --explain 5, and 1500, 0 and 5500.
A step is digit times digit, plus what stands there, plus the carry, its result first: a model that
writes `7*4+3+2=33` may work while it writes, a thought may not: `write 3 carry 3 is 7*4+3+2`. The
last one of a row writes its carry. A given step's digit and carry are taken as they stand. Thoughts
are read after the last layer: what stands there is fetched from a thought of the row before."""

import cocoracle as co

class Task(co.Sums):
    FIELDS = {"a": 10, "b": 10, "stands": 10, "carry": 10, "digit": 10}
    words = "write carry is"

    def text(self, problem):
        return "{}*{}=".format(*problem)

    def work(self, problem, given={}):
        """Steps (a, b, what stands there, carry in, digit written, carry out)."""
        a, b = [[int(digit) for digit in reversed(str(x))] for x in problem]
        row, steps = [0] * 2 * len(a), []
        for i, y in enumerate(b):
            carry = 0
            for j, x in enumerate([*a, None]):
                total = carry if x is None else x * y + row[i + j] + carry
                step = (x, y, row[i + j], carry, total % 10, total // 10)
                steps.append(given.get(len(steps), step))
                row[i + j], carry = steps[-1][4:]
        return steps

    def say(self, step):
        a, b, stands, carry, digit, carry_out = step
        if a is None:
            return f"write {digit}"
        return f"write {digit} carry {carry_out} is {a}*{b}+{stands}+{carry}"

    def spell(self, steps):
        size = next(n for n in range(2, 9) if n * (n + 1) == len(steps))
        row = [0] * 2 * size
        for number, step in enumerate(steps):
            row[number // (size + 1) + number % (size + 1)] = step[4]
        return "".join(map(str, reversed(row))).lstrip("0") or "0"

    def fields(self, step):
        return None if step[0] is None else dict(zip(self.FIELDS, step))

    def never_read(self, step):
        return step[0] is not None and (min(step[:2]), max(step[:2])) in self.NEVER_READ

    def looser(self, said):
        return {"result": said.partition(" is ")[0]}

    def typed(self, line):
        return super().typed(line.translate(str.maketrans("*+", "+*")))
