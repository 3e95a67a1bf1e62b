"""Measures the published checkpoints of syvb/cocoracle ("the seed"), by its own protocol.

    python .scripts/seed.py stage3_alllatent.pt self_oracle_alllatent.pt

Its protocol (scripts/10 and scripts/interactive.py there): numbers are GPT-2's tokens, there are as
many thoughts as gold steps (none for a final carry of 0, which tells it), readings are unwhitened,
the oracle may not end at once. 31% of its test problems are in its training data. It published 45%
of answers (teacher-forced, of validation problems), 6.9% of steps, token F1 34%. Always `carry 1
write 1` makes 16.6% and 63%: so figures have controls beside them, and one without final slots.
"""

import argparse
import pickle
import random
import re
import sys
from collections import defaultdict
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cocoracle as co  # noqa: E402
import gpt2_weights  # noqa: E402

READ = 19  # its "Layer 18" is hidden_states[19]; added a layer before, after block index 17
# questions: words, tokens at most, and in how many of the first tokens special ones are suppressed
STEP = ("What is the intermediate calculation at this reasoning step?", 25, 3)
ANSWER = ("What is the final answer?", 10, 2)

class Sums(co.Sums):
    def text(self, problem):
        return "{} + {} = ".format(*problem)

    def work(self, problem, given={}):
        """The steps, without a final carry of 0."""
        steps = super().work(problem, given)
        return steps if steps[-1].digit else steps[:-1]

    def spell(self, steps):
        return " " + "".join(str(step.digit) for step in reversed(steps))  # " 632", one token

class Text(co.Text):
    PATTERN = co.Text.PATTERN.replace(r"\p{N}|", r"\p{N}+|")  # GPT-2's own

class Thoughts(NamedTuple):
    """What the Coconut model made of problems with one number of digits and of steps."""
    problems: list
    works: list  # their steps
    readings: torch.Tensor  # (B, K, C)
    written: list  # its answers
    forced: list  # its likeliest tokens when the gold answer is given, as text

def draw(task, n):
    """The first n of the seed's test problems, in lists with one number of digits and of steps."""
    rng, alike = random.Random(456), defaultdict(list)
    for _ in range(n):
        (size,) = rng.choices([2, 3, 4], [0.3, 0.4, 0.3])
        low, high = 10 ** (size - 1), 10**size - 1
        problem = rng.randint(low, high), rng.randint(low, high)
        alike[size, len(task.work(problem))].append(problem)
    return list(alike.values())

def write(run, model, begun, limit, hold=0):
    """Greedy text after a co.Problem, a list. The first `hold` tokens are no special ones."""
    held = []
    for _ in range(hold):
        logits = model.logits(begun.hidden[:, 0])  # (B, V)
        logits[:, run.text.eos:] = -torch.inf  # <|endoftext|> and those that were added
        token = logits.argmax(-1, keepdim=True)  # (B, 1)
        hidden, segment, _ = model(model.wte(token), begun.past, begun.end)
        begun = co.Prompt([*begun.past, segment], hidden, begun.end + 1)
        held.append(token)
    ids, _ = co.write(model, begun, run.text.eos, limit - hold)
    return [run.text.show(row) for row in torch.cat([*held, ids], dim=1).tolist()]

@torch.no_grad()
def think(run, model, problems):
    """Problems with one number of digits and of steps -> Thoughts."""
    works = [run.task.work(problem) for problem in problems]
    batch = co.make_batch(run, problems, works, 0)
    prompt, _ = co.encode(run, model, batch)
    thoughts = co.think(model, prompt, len(works[0]))
    readings = co.readings_of(thoughts)
    past, end = prompt.for_answer(thoughts)
    hidden, segment, _ = model(model.wte(batch.answer[:, :1]), past, end)  # <eot>
    written = write(run, model, co.Prompt([*past, segment], hidden, end + 1), limit=15)
    written = [re.match(r"\s*(\d*)", words)[1] for words in written]  # its answers never end
    hidden, _, _ = model(model.wte(batch.answer), past, end)
    likely, forced = model.logits(hidden).argmax(-1), []  # (B, T)
    for ids, target in zip(likely.tolist(), batch.answer_target.tolist()):
        forced.append(run.text.enc.decode(ids[:target.index(run.text.eos)]).strip())
    return Thoughts(problems, works, readings, written, forced)

@torch.no_grad()
def ask(run, oracle, readings, question):
    """Answers, a list of text, to a question about readings (N, C)."""
    words, limit, hold = question
    before, said, device = run.text.ids("Layer 18: "), [], readings.device
    ids = [*before, run.text.act, *run.text.ids(f" {words}")]
    for vectors in readings.split(250):
        x = oracle.wte(co.put([ids], device)).expand(len(vectors), -1, -1)
        hidden, segment, _ = oracle(x, inject=vectors, place=len(before), last=1)
        said += write(run, oracle, co.Prompt([segment], hidden, len(ids)), limit, hold)
    return [answer.strip() for answer in said]

def answer_scores(tests):
    """How often the Coconut model's answers are right -> {measure: R}."""
    hits = defaultdict(list)
    for test in tests:
        for (a, b), written, forced in zip(test.problems, test.written, test.forced):
            hits["autoregressive"].append(written == str(a + b))
            hits["teacher-forced"].append(forced == str(a + b))
    return {measure: co.rate(right) for measure, right in hits.items()}

# the questions asked of each reading, and of none, of noise, and of another problem's, of its slot
CHANGES = {"oracle": torch.clone, "none": torch.zeros_like, "random": torch.randn_like,
           "shuffled_same_slot": lambda readings: readings.roll(1, 0)}

def oracle_scores(run, oracle, tests, change):
    """The step asked of each reading, changed, and the answer of each last one."""
    said, steps, right = [], [], []
    for test in tests:
        readings = change(test.readings)
        said += ask(run, oracle, readings.flatten(0, 1), STEP)
        steps += sum(test.works, [])
        for (a, b), words in zip(test.problems, ask(run, oracle, readings[:, -1], ANSWER)):
            right.append(re.findall(r"\d+", words)[:1] == [str(a + b)])
    return {"step": co.step_scores(run.task, said, steps), "answer": co.rate(right)}

def majority_scores(run, tests):
    """Always saying a slot's most frequent step."""
    said, steps, most = [], [], {size: co.majority(run, size) for size in run.cfg.digits}
    for test in tests:
        slots, size = len(test.works[0]), run.task.size(test.problems[0])
        said += most[size][:slots] * len(test.problems)
        steps += sum(test.works, [])
    return {"step": co.step_scores(run.task, said, steps)}

def show(name, scores):
    for measure, r in co.figures(scores, name):
        print(f"{measure:<40}{co.show_rate(r)}", flush=True)
    if "step" in scores:
        print(f"{name + ', step, token F1':<40}{scores['step']['token_f1']:.3f}", flush=True)

def parse(argv):
    parser = co.Parser(prog="seed.py", description=__doc__, allow_abbrev=False,
                       formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs=2, metavar="FILE.pt", help="Coconut model, oracle")
    parser.add_argument("--weights", default="", help="folder with merges.txt and vocab.json")
    parser.add_argument("--problems", type=int, default=1000, help="50 to 2000")
    parser.add_argument("--out", default="runs/seed", help="folder for results.json")
    parser.add_argument("--model", default="gpt2-large", choices=tuple(co.SIZES))
    args = parser.parse_args(argv)
    if not 50 <= args.problems <= 2000:  # with 50, no list that draw() makes is of one problem
        raise co.UserError("--problems takes an integer from 50 to 2000")
    if co.SIZES[args.model].layers < READ:
        raise co.UserError(f"--model {args.model} has no layer {READ}: choose gpt2-large")
    if list(Path(args.out).glob("*.json")):
        raise co.UserError(f"{args.out} has a run already: choose another --out")
    return args

def read_pickle(path, expected):
    """A state dict saved by torch.save, in the names and shapes expected. No code in it is run."""
    with gpt2_weights.one_line(path, gpt2_weights.CHOOSE):
        try:
            tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except pickle.UnpicklingError:  # its text is long, and tells how to run the code after all
            raise ValueError("more than tensors") from None
        return gpt2_weights.match(tensors, expected)

def main(argv=None):
    args = parse(argv)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cfg = co.Config(model=args.model, device=device, dtype="float32", compile=False,
                    thoughts="plain",
                    read_layer=(READ - 0.5) / co.SIZES[args.model].layers)  # rounded up
    task = Sums(cfg.digits)
    folder = args.weights or gpt2_weights.fetch(args.model, gpt2_weights.BPE_FILES)
    ranks = gpt2_weights.read_bpe(folder)
    run = co.Run(cfg, task, Text(task, ranks), Path(args.out))
    files = [read_pickle(path, co.shapes_of(run)) for path in args.checkpoints]
    coconut, oracle = [co.new_model(run, weights) for weights in files]
    run.out.mkdir(parents=True, exist_ok=True)
    tests = [think(run, coconut, problems) for problems in draw(task, args.problems)]
    answers, scores = answer_scores(tests), {}
    show("answers", answers)
    for name, change in CHANGES.items():
        scores[name] = oracle_scores(run, oracle, tests, change)
        show(name, scores[name])
    scores["slot_majority"] = majority_scores(run, tests)
    show("slot_majority", scores["slot_majority"])
    co.record(run, coconut=answers, oracle=scores.pop("oracle"), controls=scores,
              config=vars(args), env=co.environment(cfg))

def command_line(argv=None):
    """main(), with mistakes told in one line -> the exit code."""
    try:
        main(argv)
        return 0
    except co.UserError as e:
        print(f"error: {e}", file=sys.stderr)
    except OSError as e:
        print(f"error: {e}: choose another --out", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    return 2

if __name__ == "__main__":
    sys.exit(command_line())
