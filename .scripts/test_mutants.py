"""Tests that mutants asked for, and of what makes them."""

import ast
import itertools
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import mutate
import numpy as np
import pytest
import torch
import trial

import cocoracle as co
from test_cocoracle import PROBLEMS, ByHand, ids_of, rough, run_of, train

def by_hand(monkeypatch, *flags):
    """A run of hand-made thoughts, and its held-out problems solved."""
    run = run_of(*flags)
    ByHand(monkeypatch, run)
    return run, [co.solve(run, None, problems) for problems in co.held_out(run, 500)]

def wordy(run):
    """A random model whose text varies: the last norm's bias would write the same token everywhere."""
    model = rough(run, std=0.6)
    torch.nn.init.zeros_(model.ln_f.bias)
    return model

def test_greedy_text_ends_row_by_row():
    """A row ends with its stop token, and is -1 from then on. When all have ended, nothing more is written."""
    run = run_of("--digits", 3, "--thoughts", "plain")
    model = wordy(run)
    prompt, _ = co.think_through(run, model, PROBLEMS)
    with torch.no_grad():
        free = co.write(model, prompt, -5, 12)[0].tolist()
        stop = max(set.intersection(*map(set, free)), key=lambda token: len({row.index(token) for row in free}))
        want = [row[:row.index(stop) + 1] for row in free]
        longest = max(map(len, want))
        ids, _ = co.write(model, prompt, stop, 20)
    assert ids.tolist() == [row + [-1] * (longest - len(row)) for row in want] and (ids == -1).any()

def test_answers_are_greedy_text_after_the_thoughts():
    """An answer is the likeliest text of one long row: the problem, its thoughts, <eot>, and what was written."""
    run = run_of("--digits", 3, "--thoughts", "plain")
    model, text = wordy(run), run.text
    prompt, thoughts = co.think_through(run, model, PROBLEMS)
    said = co.answer(run, model, prompt, thoughts)
    with torch.no_grad():
        for row, own in enumerate(PROBLEMS):
            prefix, written = model.wte(torch.tensor([ids_of(text, run.task.text(own) + "<bot>")])), []
            fed = [prompt.hidden, *(thought.hidden for thought in thoughts[:-1])]
            x = torch.cat([prefix, *(hidden[row:row + 1] for hidden in fed)], dim=1)
            while text.eos not in written and len(written) < run.longest + 2:
                x = torch.cat([x, model.wte(torch.tensor([[(text.eot, *written)[-1]]]))], dim=1)
                written.append(model.logits(model(x)[0][0, -1]).argmax().item())
            assert len(set(written)) > 3 and said[row] == text.show(written) + "..." * (text.eos not in written)
    assert co.coconut_loss(run, model, "2", co.rng_of(0), 1).right.shape == (1,)
    (alone,) = co.answer(run, model, *co.think_through(run, model, PROBLEMS[:1]))
    assert alone == said[0]

def test_forced_answers():
    """An answer is right where each of its tokens is the likeliest after the true ones before; without gradients."""
    run, graded = run_of("--digits", 3, "--thoughts", "plain"), []
    model = wordy(run)
    solved = co.solve(run, model, PROBLEMS)
    model.register_forward_pre_hook(lambda *args: graded.append(torch.is_grad_enabled()))
    assert co.forced(run, model, [solved] * 2) == [False] * 6 and graded == [False] * 2

def test_what_is_said_of_which_vectors():
    """ask() says the likeliest text after the whole prompt, of each reading, whitened where the oracle does so: after
    the given question, or the one about the step."""
    run = run_of()
    model, text, readings = wordy(run), run.text, torch.randn(3, 96)
    white = co.Whitener(torch.randn(200, 96) * 5)
    for oracle, question in (co.Oracle(model), None), (co.Oracle(model, white), "Why?"):
        head = [*text.ids(f"{question or text.test_wording['step']} Layer 2:"), text.act]
        vectors = white(readings) if oracle.white else readings
        for row, said in enumerate(co.ask(run, oracle, readings, question)):
            written, begin = [], run.cfg.size.positions // 8 - len(head) + 1
            while text.eos not in written and len(written) < run.longest + 2:
                x = model.wte(torch.tensor([[*head, *written]]))
                hidden, _, _ = model(x, pos=begin, inject=vectors[row:row + 1], place=len(head) - 1)
                written.append(model.logits(hidden[0, -1]).argmax().item())
            assert len(set(written)) > 2 and said == text.show(written)

def test_the_longest_problem_is_counted_in_positions(monkeypatch):
    """What the longest problem takes when all is text: prefix and answer, each end counted. A longer one is refused."""
    run = run_of("--digits", "3")
    problems = run.task.draw(co.rng_of(0, "longest", 3), co.TRAIN, 3, 300)
    batch = co.make_batch(run, problems, [run.task.work(problem) for problem in problems], 4)
    positions = batch.valid.sum(1) + (batch.answer_target != co.IGNORE).sum(1)
    assert co.try_out(run).slots == 4
    most, works = int(positions.max()), [run.task.work(problem) for problem in problems]
    monkeypatch.setitem(co.SIZES, "tiny", co.Size(3, 3, 96, most))
    co.make_batch(run, problems, works, 4)
    monkeypatch.setitem(co.SIZES, "tiny", co.Size(3, 3, 96, most - 1))
    with pytest.raises(co.UserError, match=f"draw: {most} positions: [(]"):
        co.make_batch(run, problems, works, 4)
    monkeypatch.setattr(run.text, "wordings", {"step": ["a"]})
    with pytest.raises(co.UserError, match=f"draw: {most} positions: [(]"):
        co.try_out(run)

def test_positions_end_where_the_model_ends():
    """Text that runs away stays at the last position."""
    model = co.new_model(run_of())
    model.read = 0
    _, _, stream = model(torch.zeros(1, 3, 96), pos=254)
    assert torch.equal(stream[0], model.wpe.weight[[254, 255, 255]])

def test_larger_models_take_fewer_steps_in_thoughts():
    """By 1 / sqrt(width), but as many as were asked for."""
    cfg = co.parse(["--model", "gpt2", "--init", "scratch", "--train-mixed", "90"])  # 8 times as wide as tiny
    assert (cfg.train_text, cfg.train_mixed, cfg.train_latent, cfg.size.width) == (250, 90, 778, 768)

@pytest.mark.parametrize("kind, stages", [("faithful", 4), ("plain", 4), ("bottleneck", 5)])
def test_stages(tmp_path, monkeypatch, kind, stages):
    """Text, then one slot more at a time as thoughts, in so many steps for each of them, and all slots; where nobody
    explains them, these first with the problem in sight, and the last stage has a recipe of its own."""
    phases, recipes = [], []
    monkeypatch.setattr(co, "fit", lambda run, phase, model, steps, recipe, _: (
        phases.append((phase, steps)), recipes.append(recipe)))
    monkeypatch.setattr(co, "stage_scores", lambda *_: co.rate([True]))
    run = run_of("--digits", "2-4", "--train-mixed", 7, "--thoughts", kind, out=tmp_path / "run")
    run.out.mkdir()
    co.train_coconut(run)
    mixed = [(f"coconut {k}", 7 * k) for k in range(1, stages + 1)]
    assert phases == [("coconut 0", 250), *mixed, ("coconut all", 2200)]
    known = run.cfg.recipes
    own = known["explained" if kind == "faithful" else "unexplained"]
    assert len({*known.values()}) == 3 and recipes == [known["text"]] * len(phases[:-1]) + [own]

def test_tokens_before_the_answer(monkeypatch):
    """Text tokens that were written, not the padding after them, and thoughts, a problem; and seconds a problem."""
    run, _ = by_hand(monkeypatch, "--digits", 2, "--eval-problems", 8)
    through, written = co.think_through, [co.Segment((), torch.tensor([[row < 1]] * 8)) for row in range(4)]
    monkeypatch.setattr(co, "think_through", lambda *args, stage: (
        (found := through(*args))[0]._replace(past=[None, *written]), found[1]))
    monkeypatch.setattr(co, "time", SimpleNamespace(time=itertools.count(5).__next__))
    scores = co.stage_scores(run, None)
    assert scores["tokens"] == 1 + 3 and scores["exact"] == 1.0 and scores["seconds"] == 1 / 8

def test_who_is_asked_what(monkeypatch):
    """Of every thought the slot is asked, of all but finals a field, of finals alone the answer, where the problem
    has no step that is never read; final carries are half as often asked in training."""
    run, tests = by_hand(monkeypatch, "--digits", 2, "--eval-problems", 40)
    scores = co.oracle_scores(run, None, *co.cases_of(run.task, tests), ["step", "slot", "digit", "answer"])
    assert scores["slot"]["n"] == scores["step"]["n"] > scores["digit"]["n"] == scores["step"]["n_no_final"] > 60
    works = sum([test.works for test in tests], [])
    readable = [steps for steps in works if not any(map(run.task.never_read, steps))]
    assert scores["answer"]["n"] == len(readable) < len(works) == 40 and scores["answer"]["exact"] == 0.0  # it always says the step
    final = co.columns(1, 1)[-1:]
    assert co.step_scores(run.task, ["carry 0"], final)["exact"] == 1.0
    lines = "47 + 85", "47+8", "047+085", "hello", ""
    assert [run.task.typed(line) for line in lines] == [(47, 85), None, None, None, None]
    _, slots = co.readable(run.task, co.rng_of(0), [co.columns(47, 85)] * 3000)
    assert np.allclose(np.bincount(slots) / 3000, (0.4, 0.4, 0.2), atol=0.03)

@pytest.mark.parametrize("shift", range(1, 6))
def test_rows_before_are_those_of_rolled_thoughts(shift):
    """Also of fewer rows than that."""
    assert co.rows_before([0, 1, 2], shift) == torch.arange(3).roll(shift).tolist()

def test_donations_and_what_follows(monkeypatch):
    """As many donors as a figure's name says; of next thoughts, those that changed and that readers know are asked."""
    run, tests = by_hand(monkeypatch, "--digits", "2,3", "--eval-problems", 100)
    test, hits = tests[1], defaultdict(list)
    found = dict(co.donations(run, tests, test, 1, co.rng_of(0)))
    assert {name: len(donors) for name, donors in found.items()} == {
        "iia": 1, "iia_two": 2, "iia_three": 3, "iia_size": 1, "iia_same": 1}
    given = co.solve(run, None, test.problems, found["iia"])
    co.follow(run, None, test, 1, given, hits, defaultdict(list))
    pairs = zip(given.works, test.works)
    known = [not run.task.never_read(steps[2]) for steps, own in pairs if steps[2] != own[2]]
    assert len(hits["said_after"]) == sum(known) and 0 < sum(known) < len(known)
    steps, hits = co.columns(347, 285), defaultdict(list)
    late = [*steps[:2], steps[2]._replace(digit=9), steps[3]]  # the next step is as it was: it is not asked
    one, other = (SimpleNamespace(works=[each], answers=[""], thoughts=[]) for each in (steps, late))
    co.follow(run, None, one, 0, other, hits, defaultdict(list))
    assert len(hits["iia_flow"]) == 1 and not hits["said_after"]
    views = co.examples(run, None, None, tests, n=6)  # the middle slot is given
    assert [list(view["exchanged"]["donors"]) for view in views] == [["1"]] * 6

def test_what_an_oracle_s_step_trains(monkeypatch):
    """Three steps of four go half as far as the longest text; a quarter of a fine-tuned oracle's, of no LoRA's,
    rehearse the coconut's task as well, on a quarter of a batch."""
    run, reached, rehearsed = run_of("--digits", 2, "--batch-size", 8), [], []
    problems = run.task.draw(co.rng_of(0), co.TRAIN, 2, 8)
    drawn = problems, [run.task.work(problem) for problem in problems], torch.randn(8, 3, 96)
    loss = co.Loss(torch.tensor(1.0), torch.tensor(1.0), torch.ones(8))

    def fit(run, name, model, steps, rates, loss_of):
        totals = [loss_of(step, co.rng_of(step)).total.item() for step in range(200)]
        assert totals.count(2.0) == len(rehearsed)

    monkeypatch.setattr(co, "pool_of", lambda *args: lambda step, rng, n: drawn)
    monkeypatch.setattr(co, "oracle_loss", lambda run, model, questions, targets, vectors, most=None: reached.append(
        most) or (loss.total, loss.right))
    monkeypatch.setattr(co, "coconut_loss", lambda *args: rehearsed.append(args[-1]) or loss)
    monkeypatch.setattr(co, "fit", fit)
    monkeypatch.setattr(co, "load_model", lambda *args: co.new_model(run))
    monkeypatch.setattr(co, "save_model", lambda *args: None)
    co.train_oracle(run, "lora")
    half = run.longest // 2
    assert reached == [None, half, half, half] * 50 and not rehearsed
    co.train_oracle(run)
    assert set(rehearsed) == {2} and 30 < len(rehearsed) < 70

def test_what_a_log_line_says(tmp_path, monkeypatch):
    """Every 100 steps and after the last one: means of the steps since the last line, their speed, the time left."""
    run, seconds, lines = run_of("--accumulate", 2, out=tmp_path / "run"), [7.0], []

    def step(*args):
        seconds[0] += 2.0  # a step takes so long
        return torch.tensor([1.5, 0.5]), 64

    monkeypatch.setattr(co, "time", SimpleNamespace(time=lambda: seconds[0]))
    monkeypatch.setattr(co, "train_step", step)
    model = torch.nn.Linear(2, 2)
    states = [optimizer.state_dict() for optimizer in co.make_optimizers(run, model, run.cfg.recipes["text"])]
    last = {"phase": "x", "step": 40, "params": {}, "optimizers": states}
    monkeypatch.setattr(co, "load_last", lambda run: last)
    monkeypatch.setattr(co, "log", lambda run, phase, *line: lines.append(line))
    train(run, 230, model=model)
    want = [(step, 230, 1.5, 0.5, 32.0, 2.0 * (230 - step)) for step in (100, 200, 230)]
    assert np.allclose(lines, want)

def test_a_step_s_figures_are_means_of_its_parts():
    """Nats, and the share that is right, of all parts together."""
    model, parts = torch.nn.Linear(2, 1), []
    for nats, right in (1.0, [1.0, 0.0]), (4.0, [1.0, 1.0]):
        parts.append(co.Loss(model(torch.ones(2)).sum(), torch.tensor(nats), torch.tensor(right)))
    stats, n = co.train_step(run_of("--accumulate", 2), model, [], "x", 0, lambda *_: parts.pop())
    assert stats.tolist() == [2.5, 0.75] and n == 4

def test_probes_learn_from_many_thoughts(monkeypatch):
    """Thousands, made once for all steps of all probes: of fewer ones they would learn by heart."""
    run, made = run_of("--digits", 2), []

    def think_through(run, model, problems):
        made.append(len(problems))
        return None, [co.Thought(None, None, torch.randn(len(problems), 96))] * 3

    monkeypatch.setattr(co, "think_through", think_through)
    monkeypatch.setattr(co, "fit", lambda run, phase, model, steps, rates, loss_of: [
        loss_of(step, co.rng_of(step)) for step in (0, 9999)])
    for name in "load_model", "write_safetensors":
        monkeypatch.setattr(co, name, lambda *args: None)
    co.train_probes(run)
    assert made == [1000] * 9  # the whitener's, the probes'

def test_random_weights_are_of_the_right_size():
    """Of every matrix, and of an adapter's."""
    model = co.new_model(run_of())
    co.add_lora(model)
    mlp, std = model.h[0].mlp, 0.5 / 96**0.5
    for matrix, wanted in ((model.wte.weight, std), (model.wpe.weight, std / 2), (mlp.c_fc.weight, std),
                           (mlp.c_proj.weight, std / 6**0.5), (mlp.c_fc.lora_a, 1 / 96**0.5)):
        assert abs(matrix.std() / wanted - 1) < 0.06

@pytest.mark.parametrize("most, shares", [(1, (0.1, 0.1, 0.1, 0.2)), (2, (0.15, 0.15, 0.15, 0.2375))])
def test_which_slots_are_exchanged(monkeypatch, most, shares):
    """In half of the batches one is, the last twice as often as any other, and with --given perhaps another one."""
    run, slots = run_of("--digits", 3, "--batch-size", 2, "--given", most), []

    def work(problem, given={}):
        slots.extend(given)
        return co.columns(*problem, given)

    def stop(*args):
        raise StopIteration

    monkeypatch.setattr(run.task, "work", work)
    monkeypatch.setattr(co, "make_batch", stop)
    for step in range(500):
        with pytest.raises(StopIteration):
            co.coconut_loss(run, None, "all", co.rng_of(step))
    assert np.allclose(np.bincount(slots) / 1000, shares, atol=0.03)  # two problems a batch

def test_held_out_batches():
    """At least four problems of each size, split evenly into batches that are no larger than told."""
    batches = co.held_out(run_of("--digits", "2,3", "--eval-problems", 2), 3)
    assert [len(batch) for batch in batches] == [2, 2, 2, 2] and len(set(sum(batches, []))) == 8

def test_a_disk_too_full_for_a_first_byte(tmp_path, monkeypatch):
    """Where not even an empty file could be made, that is told in one line, too."""
    monkeypatch.setattr(torch, "save", mock.Mock(side_effect=OSError(28, "No space left")))
    with pytest.raises(co.UserError, match="make room"):
        co.save_last(run_of(out=tmp_path), "x", 1, torch.nn.Linear(2, 2), [])

def test_a_slow_checkpoint_is_not_followed_by_the_next(tmp_path, monkeypatch):
    """The time between checkpoints is counted from the end of the last one."""
    now, saved = [0.0], []

    def save(run, phase, step, *rest):
        saved.append(step)
        now[0] += 1000

    monkeypatch.setattr(co, "save_last", save)
    monkeypatch.setattr(co, "time", SimpleNamespace(time=lambda: now.append(now.pop() + 7) or now[0]))
    train(run_of("--batch-size", 4, out=tmp_path / "run"), 20)
    assert saved == [9, 18, 20]

def test_both_halves_of_a_block_are_compiled(monkeypatch):
    """What is before attention and what is after it, for any number of rows."""
    compiled, how = [], {"dynamic": True, "backend": "eager"}
    monkeypatch.setattr(torch, "compile", lambda function, **how: compiled.append((function.__name__, how)))
    co.Block(8, 2).compile(backend="eager")
    assert compiled == [("before", how), ("after", how)]

def test_whitened_readings_are_finite():
    """Also along what does not vary at all."""
    x = torch.randn(200, 8)
    x[:, 3] = 2.0
    assert co.Whitener(x)(x).isfinite().all()

SOURCE = '''
# 3. One
def f(a, mask):
    """Text 1."""
    total: int = 5
    if a < 3 and mask:
        raise ValueError(1)
    with torch.no_grad():
        a = g(a.detach(), mask, low=2)[a:]
    print(a + 7)
    return a // 2
# 12. Another
LAST = 4
'''

def test_mutants_are_small_and_the_same_again():
    """Each kind of change is made, in its sections alone, and undone; a seed gives the same ones again, and nearly the
    same ones of a changed program."""
    tree = ast.parse(SOURCE)
    whole = ast.unparse(tree)
    every = mutate.drawn(SOURCE, tree, 0, 99)
    for change in ("a < 3 and mask: -> if a <= 3 and mask:", "3 and mask: -> if a < 4 and", "if a < 3 or mask",
                   "if a < 3 and mask: -> removed", "raise ValueError(1) -> removed", "ValueError(2)", "g(a, mask",
                   "with torch.no_grad(): -> if True:", "None, low", "low=3", "g(a.detach(), mask)[", "[a + 1:]",
                   "a % 2", "a // 3"):
        assert any(change in words for words in every), change
    for mutant in every.values():
        with mutate.applied(mutant):
            assert ast.unparse(ast.fix_missing_locations(tree)) != whole
        assert ast.unparse(tree) == whole and mutant.function == "f"
    some, changed = list(mutate.drawn(SOURCE, tree, 0, 8)), SOURCE.replace("a // 2", "a // 5")
    assert len(every) == 15 and some == list(mutate.drawn(SOURCE, ast.parse(SOURCE), 0, 8))
    assert len({*some} & {*mutate.drawn(changed, ast.parse(changed), 0, 8)}) >= 6
    code = "'text'\ndef f():\n    def g(): return 1\n    return g()\nclass A:\n    def h(self): return f()\nA().h()"
    assert "_called.add('A.h')" in ast.unparse(trial.recording(ast.parse(code)))

def test_every_explained_mutant_can_still_be_drawn():
    """mutants.json names mutants of this program, not of one that was."""
    source, here = Path(co.__file__).read_text(), Path(mutate.__file__).parent
    every = mutate.drawn(source, ast.parse(source), 0, 10**6)
    assert {*json.loads((here / "mutants.json").read_text())} <= {*every}

def test_a_step_is_given_as_text_too(monkeypatch):
    """In half of the batches of a mixed stage one or two written steps are of rows before and not to be predicted,
    all later text, the answer and the words of thoughts are worked with it. Of faithful thoughts alone."""
    run, made, asked = run_of("--digits", "3", "--batch-size", 6, "--given", 2), [], []
    model, make_batch, explain_loss = rough(run), co.make_batch, co.explain_loss
    monkeypatch.setattr(co, "make_batch", lambda *args: made.append((args, make_batch(*args))) or made[-1][1])
    monkeypatch.setattr(co, "explain_loss", lambda *args: asked.append(args) or explain_loss(*args))
    seen = []
    for step in range(40):
        co.coconut_loss(run, model, "2", co.rng_of(1, step))
        (_, problems, works, n_text, slots), batch = made[-1]
        own = [co.columns(*p) for p in problems]
        seen.append(tuple(slots))
        given = [{slot: own[row - shift][slot] for shift, slot in enumerate(slots, 1)} for row in range(len(own))]
        assert n_text == 2 and works == [co.columns(*p, steps) for p, steps in zip(problems, given)]
        assert works == asked[-1][4]
        for steps, target in zip(works, batch.text_target.tolist()):
            said = [run.task.say(step) + "<sep>" for number, step in enumerate(steps[:2]) if number not in slots]
            assert tuple(t for t in target if t != co.IGNORE) == ids_of(run.text, "".join(said))
    assert set(seen) == {(), (0,), (1,), (0, 1)} and 10 < seen.count(()) < 30
    run = run_of("--digits", "3", "--batch-size", 6, "--thoughts", "explained")
    for step in range(8):
        co.coconut_loss(run, model, "2", co.rng_of(1, step))
        assert made[-1][0][4] == []

@pytest.mark.parametrize("size, stage", [(6, "all"), (5, "all"), (2, "all"), (5, "2")])
def test_every_second_problem_is_asked_of_its_own_thought(monkeypatch, size, stage):
    """The explaining loss asks half of the problems, and each reading stands for the step that is to be said, also
    where it, or one before it, is given. Half as large are the repeated batches of text, in the last stage alone."""
    run, made, thought, asked = run_of("--digits", 3, "--batch-size", size), [], [], []
    model, make_batch, think, oracle_loss = rough(run), co.make_batch, co.think, co.oracle_loss
    monkeypatch.setattr(co, "make_batch", lambda *args: made.append(args) or make_batch(*args))
    monkeypatch.setattr(co, "think", lambda *args: thought.append(think(*args)) or thought[-1])
    monkeypatch.setattr(co, "oracle_loss", lambda *args: asked.append(args[2:]) or oracle_loss(*args))
    monkeypatch.setattr(co, "truth", lambda task, problem, steps, slot, _: f"{problem} {slot} {task.say(steps[slot])}")
    for step in range(12):
        co.coconut_loss(run, model, stage, co.rng_of(1, step))
        _, problems, works, n_text, _ = made[-1]
        _, targets, vectors = asked[-1]
        readings = co.readings_of(thought[-1])
        assert len(targets) == len(vectors) == (size + 1) // 2
        for target, vector in zip(targets, vectors):
            assert target in [f"{problem} {slot} {run.task.say(works[row][slot])}"
                              for row, problem in enumerate(problems) if row % 2 == 0 for slot in range(n_text, 4)
                              if torch.equal(vector, readings[row, slot - n_text])]

def test_the_curriculum_repeats_text_in_half_batches(tmp_path, monkeypatch):
    """In 15% of the batches of the last stage, and in no other stage."""
    sizes, run = defaultdict(list), run_of("--digits", 2, "--batch-size", 7, out=tmp_path / "run")
    monkeypatch.setattr(co, "fit", lambda run, phase, model, steps, recipe, loss_of: [
        loss_of(step, co.rng_of(1, step)) for step in range(200)])
    monkeypatch.setattr(co, "coconut_loss", lambda run, model, stage, rng, n=None: sizes[stage].append(n))
    monkeypatch.setattr(co, "stage_scores", lambda *_: co.rate([True]))
    run.out.mkdir()
    co.train_coconut(run)
    assert sizes["0"][:200] == [None] * 200 and set(sizes["0"][200:]) == {4} and 15 < len(sizes["0"][200:]) < 45
    assert sizes["1"] == sizes["2"] == [None] * 200 and set(sizes["all"]) == {None}
    assert [*sizes] == ["0", "1", "2", "all"]

def test_readers_never_see_problems_of_which_nothing_may_be_read(monkeypatch):
    """Else a small batch of them would leave nothing to ask about."""
    run = run_of("--digits", 2)
    monkeypatch.setattr(run.task, "never_read", lambda step: step.a is None or step.a > 1)
    problems, works, _ = co.pool_of(run, rough(run), each=200)(0, co.rng_of(0), 2000)
    assert len({*problems}) > 20 and all(min(steps[0].a, steps[1].a) < 2 for steps in works)

def test_thoughts_are_asked_for_as_often_as_told(monkeypatch):
    """--explain: so many thoughts a problem, of every second one where it is 0.5; each counts as much as an answer."""
    monkeypatch.setattr(co, "OTHER", 0.0)
    asked, oracle_loss = [], co.oracle_loss
    monkeypatch.setattr(co, "oracle_loss", lambda *args: asked.append(args) or oracle_loss(*args))
    for each, rows in ((0.5, {0, 2, 4}), (1, {*range(6)}), (3, {*range(6)})):
        run = run_of("--digits", "3", "--batch-size", 6, "--thoughts", "explained", "--explain", each)
        model, made, seen = rough(run), [], set()
        think, make_batch = co.think, co.make_batch
        with monkeypatch.context() as patch:
            patch.setattr(co, "think", lambda *args: made.append(think(*args)) or made[-1])
            patch.setattr(co, "make_batch", lambda r, p, works, *n: made.append(works) or make_batch(r, p, works, *n))
            for step in range(12):
                loss = co.coconut_loss(run, model, "all", co.rng_of(2, step))
                works, thoughts = made[-2:]
                _, _, questions, targets, vectors = asked[-1]
                assert len(questions) == 6 * each
                readings = co.readings_of(thoughts)
                for target, vector in zip(targets, vectors):
                    (found,) = (readings == vector).all(-1).nonzero().tolist()
                    assert target == run.task.say(works[found[0]][found[1]])
                    seen.add(found[0])
                told = oracle_loss(run, model, questions, targets, vectors)[0]
                assert torch.allclose(loss.total, loss.nats + each * told)
        assert seen == rows
    run = run_of("--digits", "3", "--batch-size", 75, "--explain", 0.68)  # in binary more than 51
    co.coconut_loss(run, rough(run), "all", co.rng_of(2))
