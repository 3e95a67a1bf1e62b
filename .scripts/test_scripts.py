"""Tests of the scripts and tasks beside cocoracle.py: the seed's checkpoints, the comparison, speed, the GPU, tasks."""

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import cocoracle as co
from test_cocoracle import BPE, HERE, SHORT, TORTURE, asked, cli, mini, miniature, narrow, run_of, short  # noqa: F401

SEED = Path(co.__file__).parent / ".scripts" / "seed.py"

class PlainSeed:
    """The seed's own way (scripts/10, interactive.py), one problem at a time, in plain transformers: random models."""
    def __init__(self, directory):
        import transformers as hf
        tok = self.tok = hf.GPT2Tokenizer(vocab=str(BPE / "encoder.json"), merges=str(BPE / "vocab.bpe"))
        tok.add_special_tokens({"additional_special_tokens": ["<bot>", "<sep>", "<eot>", "<act>"]})
        self.ids = lambda words: torch.tensor([tok(words)["input_ids"]])
        numbers = [n for word, n in tok.get_vocab().items() if re.fullmatch("Ġ?[0-9]{1,3}", word)]
        for name in ("coconut", "oracle"):
            torch.manual_seed(len(name))
            config = hf.GPT2Config(n_layer=20, n_head=2, n_embd=16, vocab_size=50261, initializer_range=0.3)
            model = hf.GPT2LMHeadModel(config).eval().requires_grad_(False)
            model.transformer.wte.weight[numbers] *= 2  # so that they are written often
            model.transformer.wte.weight[50256:] *= 8 if name == "oracle" else 1  # special ones as soon as it may
            model.transformer.h[18].attn.c_proj.weight *= 8  # so that what is injected matters
            torch.save(model.state_dict(), directory / f"{name}.pt")
            setattr(self, name, model)

    def think(self, a, b):
        """-> readings (K, C), as many as the answer has digits; likeliest text, given the answer; answer written."""
        model, head, readings, written = self.coconut.transformer, self.coconut.lm_head, [], []
        out = model(self.ids(f"{a} + {b} = <bot>"), use_cache=True)
        past, ids = out.past_key_values, self.ids(f"<eot> {a + b}")
        for _ in str(a + b):
            out = model(inputs_embeds=out.last_hidden_state[:, -1:], past_key_values=past, output_hidden_states=True)
            readings.append(out.hidden_states[19][0, 0])
        forced = head(model(ids[:, :-1], past_key_values=past).last_hidden_state)[0].argmax(-1)
        past.crop(1 - ids.shape[1])
        token = ids[:, :1]
        while len(written) < 15 and (self.tok.decode(written).strip() or "0").isdigit():
            token = head(model(token, past_key_values=past).last_hidden_state).argmax(-1)
            written.append(token.item())
        written = re.match(r"\d*", self.tok.decode(written).strip())[0]
        return torch.stack(readings), self.tok.decode(forced).strip(), written

    def ask(self, vector, words, hold, limit):
        """-> logits at the prompt's last token, and greedy text."""
        ids = prompt = self.ids(f"Layer 18: <act> {words}")
        at, every = prompt[0].tolist().index(50260), []
        def add(_, __, h):
            h[:, at] += 2.0 * h[:, at].norm() * vector / vector.norm()
        with self.oracle.transformer.h[17].register_forward_hook(add):
            while len(every) < limit and ids[0, -1] != 50256:
                every.append(self.oracle(ids).logits[0, -1])
                token = every[-1][:50256 if len(every) <= hold else None].argmax()
                ids = torch.cat([ids, token[None, None]], 1)
        return every[0], self.tok.decode(ids[0, prompt.shape[1]:]).removesuffix("<|endoftext|>").strip()

@pytest.fixture
def seed(tmp_path, monkeypatch):
    """-> the script as a module, its arguments, the seed's own way with the same checkpoints of 20 narrow layers."""
    monkeypatch.setitem(co.SIZES, "gpt2-large", co.Size(20, 2, 16))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for ours, theirs in (("merges.txt", "vocab.bpe"), ("vocab.json", "encoder.json")):
        (tmp_path / ours).symlink_to(BPE / theirs)
    spec = importlib.util.spec_from_file_location("seed", SEED)
    spec.loader.exec_module(script := importlib.util.module_from_spec(spec))
    args = [tmp_path / "coconut.pt", tmp_path / "oracle.pt", "--weights", tmp_path, "--out", tmp_path / "run"]
    return script, list(map(str, args)), PlainSeed(tmp_path)

def test_seed_script_equals_plain_transformers(seed, monkeypatch):
    """Readings, answers, injected logits and greedy texts are those of the seed's own way, in padded batches too."""
    (script, args, plain), kept, first = seed, [], []
    monkeypatch.setattr(script, "draw", lambda *_: [[(347, 285), (108, 820)], [(8638, 8130), (2000, 9000)], [(47, 12)]])
    monkeypatch.setattr(script, "oracle_scores", lambda *given: kept.append(given) or {})
    assert script.command_line(args) == 0
    (run, oracle, tests, _), logits = kept[0], kept[0][1].logits
    for test in tests:
        for row, (a, b) in enumerate(test.problems):
            readings, *texts = plain.think(a, b)
            assert len(readings) == len(test.works[row]) and (readings - test.readings[row]).abs().max() < 1e-4
            assert texts == [test.forced[row], test.written[row]] and all(texts)
    monkeypatch.setattr(oracle, "logits", lambda hidden: first.append(logits(hidden)) or first[-1].clone())
    vectors = torch.cat([test.readings[:1, -1] for test in tests])
    for end in (1, 0.01):  # the oracle ends as soon as it may; it goes on to the limit
        for model in (oracle, plain.oracle.transformer):
            model.wte.weight.data[50256:] *= end
        for question, *plainly in ((script.STEP, "What is the intermediate calculation at this reasoning step?", 3, 25),
                                   (script.ANSWER, "What is the final answer?", 2, 10)):
            first.clear()
            for row, said in enumerate(script.ask(run, oracle, vectors, question)):
                theirs, text = plain.ask(vectors[row], *plainly)
                assert said == text and (first[0][row] - theirs).abs().max() < 1e-4

def test_seed_script_scores(seed, monkeypatch):
    """Who finds the truth in readings is right about all 3,571 steps that the seed counted, controls are not."""
    (script, args, _), truth = seed, [("", "")]
    def think(run, model, problems):
        works, sums, start = [run.task.work(p) for p in problems], [str(a + b) for a, b in problems], len(truth)
        for answer, steps in zip(sums, works):
            truth.extend((run.task.say(step), f"it is {answer}, not 7" * (step == steps[-1])) for step in steps)
        readings = torch.arange(start, len(truth)).view(len(works), -1, 1)
        return script.Thoughts(problems, works, readings.float(), sums, ["0", *sums[1:]])
    monkeypatch.setattr(script, "think", think)
    monkeypatch.setattr(script, "ask", lambda run, oracle, readings, question: [
        truth[int(n)][question == script.ANSWER] for n in readings.flatten()])
    assert script.command_line(args) == 0
    results = co.load_json(Path(args[-1], "results.json"))
    step, answer, coconut, controls = *results["oracle"].values(), results["coconut"], results["controls"]
    assert (step["n"], step["exact"], step["token_f1"], step["exact_no_final"]) == (3571, 1, 1, 1)
    assert answer == coconut["autoregressive"] == co.rate([True] * 1000) and coconut["teacher-forced"]["exact"] == 0.994
    for name, low in (("none", 0), ("random", 0), ("shuffled_same_slot", 0.166), ("slot_majority", 0.166)):
        assert low <= controls[name]["step"]["exact"] < low + 0.03 and controls[name]["step"]["exact_no_final"] < 0.05
    assert script.command_line(args) == 2 and co.load_json(Path(args[-1], "results.json")) == results

def test_seed_script_tells_mistakes_in_one_line(seed, capsys):
    """No file, one that would run code, one of another model, wrong flags: nothing is run, and nothing written."""
    (script, args, _), Hostile = seed, type("Hostile", (), {"__reduce__": lambda self: (print, ("code was run",))})
    for content, flags in (({"wte.weight": Hostile()}, ""), ([1], ""), ({"wte.weight": torch.zeros(3)}, ""),
                           (0, "more"), (0, "--problems 3"), (0, "--model gpt2"), (0, "--weights nowhere")):
        torch.save(content, args[1])
        assert script.command_line([*args, *flags.split()]) == 2
        told = capsys.readouterr()
        assert re.fullmatch(r"error: .*\n", told.err) and not told.out and (flags or args[1] in told.err)
    done = subprocess.run([sys.executable, SEED, "nowhere.pt", *args[1:]], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and re.fullmatch(r"error: nowhere\.pt.*\n", done.stderr) and not Path(args[-1]).exists()

TASK = str(HERE / ".tasks/coconut_json.py")
NARROW = {"tiny": co.Size(2, 2, 32, 256), "gpt2": co.Size(2, 2, 32)}

def module_of(path):
    spec = importlib.util.spec_from_file_location(Path(path).stem, HERE / path)
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module

def test_bench_measures_what_is_run(monkeypatch, tmp_path, capsys):
    """Bench writes nothing, tells five kinds of step, and counts FLOPs as 6 a weight and token."""
    bench = module_of(".scripts/bench.py")
    monkeypatch.setitem(co.SIZES, "tiny", co.Size(2, 2, 96, 256))
    bench.BUDGET, bench.SIDE["cpu"] = 0.0, 256
    (tmp_path / "config.json").touch()  # of a run, that bench leaves alone
    bench.main(["--digits", "2", "--batch-size", "4", "--device", "cpu", "--out", str(tmp_path)])
    steps = json.loads(capsys.readouterr().out.splitlines()[-1])["steps"]
    names = ["text step", "all-thoughts step", "one example at a time, 16 added up", "oracle step", "answers"]
    assert [*steps] == names and list(tmp_path.iterdir()) == [tmp_path / "config.json"]
    for name, r in steps.items():
        assert all(math.isfinite(x) and (x > 0 or unit == "compile s") for unit, x in r.items()), name
        flops = 1e12 * r["TFLOP"] / r["tokens/s"] / r["seconds"] / (2 * 12 * 96**2)  # a weight and token
        low, high = {"answers": (1.5, 3), "oracle step": (3, 7)}.get(name, (4.8, 7.2))
        assert low < flops < high, name
    with pytest.raises(co.UserError, match="choose thoughts"):
        bench.main(["--thoughts", "none"])

def test_the_gpu_script_compares_what_it_says(monkeypatch, tmp_path, capsys):
    """Compiled bfloat16 steps are as near to float32 as eager ones, and thoughts are exchanged."""
    gpu, rolls, roll = module_of(".scripts/gpu.py"), [], co.Thought.roll
    monkeypatch.setattr(co, "SIZES", NARROW)
    monkeypatch.setattr(co.Thought, "roll", lambda *args: rolls.append(1) or roll(*args))
    assert 2 <= gpu.correctness("cpu", "gpt2", tmp_path, "eager") < 20 and rolls
    checks = co.load_json(tmp_path / "checks.json")
    assert len(checks) == capsys.readouterr().out.count("ok     ") == 6
    for name, check in checks.items():
        low, far = 0 if name.startswith("tiny") else 1e-5, check["far"]
        assert check["ok"] and low <= far["losses"] < 1e-2 and low <= far["gradient"] < 0.1, name

def test_memory_worked_out_is_that_of_real_tensors(monkeypatch):
    """Fake tensors keep as many bytes as real ones."""
    memory, run = module_of(".scripts/memory.py"), run_of("--digits", "2", "--batch-size", "2", "--dtype", "bfloat16")
    monkeypatch.setattr(co, "SIZES", NARROW)
    monkeypatch.setattr(memory, "N_VOCAB", run.text.n_vocab)
    fake = memory.memory(run)
    monkeypatch.setattr(memory, "FakeTensorMode", lambda **how: contextlib.nullcontext())
    assert memory.memory(run) == fake and fake["in all"] > 3 * fake["weights"] > 12 * run.text.n_vocab * 32

class OneDevice(torch.utils._python_dispatch.TorchDispatchMode):
    """No operation but a copy takes tensors of two devices, numbers aside."""
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        tensors = [x for x in torch.utils._pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor) and x.ndim]
        assert len({x.device for x in tensors}) < 2 or "copy" in str(func), func
        return func(*args, **(kwargs or {}))

@pytest.mark.parametrize("kind", ["faithful", *(pytest.param(kind, marks=TORTURE) for kind in ("pause", "none"))])
def test_training_keeps_to_its_device(monkeypatch, kind):
    """Losses, gradients and reading of a model on another device (meta: no numbers): nothing is left on the CPU."""
    run = run_of("--thoughts", kind, "--digits", "3", "--batch-size", "4")
    run = run._replace(cfg=dataclasses.replace(run.cfg, device="meta"))
    model = co.new_model(run)
    monkeypatch.setattr(co, "evaluating", lambda run, model: torch.no_grad())  # meta has no autocast
    with OneDevice():
        for stage, step in (("0", 0), ("2", 0), *(("all", step) for step in range(4))):
            loss = co.coconut_loss(run, model, stage, co.rng_of(0, step))
            loss.total.backward()
            assert loss.right.device.type == model.wte.weight.grad.device.type == "meta"
        problems = run.task.draw(co.rng_of(0), co.TRAIN, 3, 4)
        if run.cfg.kind.latent:
            readings = torch.stack([thought.reading for thought in co.think_through(run, model, problems)[1]], dim=1)
            works = [run.task.work(problem) for problem in problems]
            questions, targets, *where = co.draw_questions(run, co.rng_of(1), ["step", "slot"], problems, works)
            co.oracle_loss(run, model, questions, targets, co.pick(readings, *where))[0].backward()

def failed(folder):
    return [name for name, check in co.load_json(folder / "checks.json").items() if not check["ok"]]

def test_the_gpu_script_records_a_miss_and_goes_on(monkeypatch, tmp_path):
    """A compiled block that computes something else is recorded, as are crashes and bad exits, and the rest is done."""
    gpu, commands, right = module_of(".scripts/gpu.py"), [], {"losses": torch.ones(3), "gradient": torch.ones(3)}
    for name in right:
        gpu.compare(tmp_path, name, {**right, name: torch.tensor([1, 1, torch.nan])}, right, gpu.FLOAT32)
    monkeypatch.setattr(co, "SIZES", NARROW)
    gpu.PARTS = 1
    monkeypatch.setattr(co.Block, "compile", lambda block, backend: block.mlp.c_proj.weight.data.mul_(3))
    gpu.correctness("cpu", "gpt2", tmp_path)
    assert failed(tmp_path)[:2] == [*right] and len(failed(tmp_path)) == 5
    def run(args, **how):
        commands.append(str(args[-1]))
        return gpu.subprocess.CompletedProcess(args, returncode=int(commands[-1] != "gpt2"))
    monkeypatch.setattr(gpu.subprocess, "run", run)
    gpu.correctness = lambda *args: 9 if commands else 1 / 0
    assert gpu.main(tmp_path / "all", 100) == 1 and len(commands) == 4
    assert failed(tmp_path / "all") == ["gpt2, correctness", "bench-gpt2-large", "gpt2", "gpt2-large"]
    (tmp_path / "all/gpt2/config.json").mkdir(parents=True)
    assert gpu.main(tmp_path / "all", 100) == 1 and gpu.main(tmp_path / "all", 5) == 1
    assert commands[4:] == ["gpt2-large", "--resume", str(tmp_path / "all/gpt2-large")]

def test_a_stand_in_for_released_weights(tmp_path, monkeypatch):
    """It has learnt something, is taken up as released weights are, and is trained with the rates that were asked for."""
    script = module_of(".scripts/standin.py")
    for name, value in {"LAYERS": 2, "HEADS": 1, "WIDTH": 32, "POSITIONS": 256, "BATCH": 2}.items():
        monkeypatch.setattr(script, name, value)
    monkeypatch.setattr(script, "time", SimpleNamespace(time=itertools.count().__next__))  # a step takes a second
    assert script.make(tmp_path / "weights", 0.5, most=2e5) < math.log(50257) - 0.5
    flags = ["--model", "gpt2", "--weights", str(tmp_path / "weights"), "--device", "cpu", "--digits", "2"]
    run = run_of(*flags)
    weights = co.read_safetensors(tmp_path / "weights/model.safetensors", co.shapes_of(run, 50257))
    assert run.cfg.size == (2, 1, 32, 256) and run.cfg.recipes["explained"].muon == 0.02
    assert torch.equal(co.released_weights(run)["wte.weight"][:50257], weights["wte.weight"])
    used = []
    monkeypatch.setattr(co, "RECIPES", co.RECIPES)  # put back afterwards
    monkeypatch.setattr(co, "train_coconut", lambda run: (used.append(run.cfg.recipes), run.out.mkdir()))
    monkeypatch.setitem(co.PARTS, "coconut", (co.train_coconut, "coconut/model.safetensors"))
    args = [*flags, "--stage", "coconut", "--out", str(tmp_path / "run")]
    assert script.main(["make", str(tmp_path / "weights"), "1"]) == script.main(["make"]) == script.main([]) == 2
    assert script.main(["adamw", *args]) == 0 and used[0]["explained"] == (pytest.approx(1e-4), 0.0, 0.01)

def test_the_model_card_thinks(mini, capsys, monkeypatch):
    """The Python of coconut's README.md, plain transformers, gives the answer that it says, and other problems' too."""
    out, r, _ = mini
    monkeypatch.chdir(out)
    cards = module_of(".scripts/cards.py")
    with pytest.raises(co.UserError, match="no finished run"):
        cards.write_cards(co.parse(["--out", "nowhere"]))
    cards.write_cards(co.parse(["--out", "."]))
    card = Path("coconut/README.md").read_text()
    code = card.split("```python\n")[1].split("```")[0]
    assert co.headline(r) in card and co.tables(r) in card and Path("lora/README.md").read_text().startswith("# lora")
    for view in r["examples"][:5]:
        exec(code.replace(r["examples"][0]["problem"], view["problem"]), {})
        assert capsys.readouterr().out.strip() == view["answer"]

def test_figures_by_size(mini):
    """The sizes' problems are the run's own, more or fewer of each; together their figures are the run's."""
    out, r, _ = mini
    sizes, per_size = module_of(".scripts/sizes.py"), [rate["n"] for rate in r["coconut"]["by_digits"].values()]
    rows = [line.strip("| ").split(" | ") for line in sizes.table(out, per_size[0])[2:]]
    assert [row[:3] for row in rows] == [[size, str(rate["n"]), f"{rate['exact']:.3f}"]
                                         for size, rate in r["coconut"]["by_digits"].items()]
    for column, whole in ((3, r["oracle"]["step"]["exact_no_final"]), (5, r["causal"]["iia_changed"]["exact"])):
        shares = [float(row[column]) for row in rows]
        assert min(shares) - 0.001 <= whole <= max(shares) + 0.001

def test_problems_of_coconuts_files_run(monkeypatch, tmp_path):
    """A JSON file as facebookresearch/coconut has them is learnt and measured, from data to report."""
    items = [{"question": f"Ann has {n} pears and eats {n % 7}. How many?", "answer": str(n - n % 7),
              "steps": [f"<<{n}-{n % 7}={n - n % 7}>>", "so"][:n % 3]} for n in range(60)]
    (tmp_path / "x.json").write_text(json.dumps(items))
    monkeypatch.setenv("COCONUT_JSON", str(tmp_path / "x.json"))
    monkeypatch.setattr(co, "SIZES", NARROW)
    flags = "--train-text 3 --train-mixed 1 --train-latent 3 --train-probes 2 --train-lora 2 --digits 1 --device cpu"
    assert co.command_line([*flags.split(), "--task", TASK, "--out", str(tmp_path / "run")]) == 0
    results = co.load_json(tmp_path / "run/results.json")
    step, stages = results["oracle"]["step"], results["coconut"]["stages"]
    assert 0 < step["n_no_final"] < step["n"] == 2 * stages["all"]["n"] and list(stages) == ["0", "1", "all"]
    assert "iia" not in results["causal"] and (tmp_path / "run/report.html").exists()

def test_draws_of_coconuts_files(monkeypatch, tmp_path, capsys):
    """Held-out questions are distinct whatever their case; a file that is no such list costs one line."""
    path, begin = tmp_path / "x.json", ["--task", TASK, "--out", str(tmp_path / "out")]
    items = [{"question": f"Is {n} odd?", "answer": "yes", "steps": ["a b"] * (n % 4)} for n in range(60)]
    monkeypatch.setenv("COCONUT_JSON", str(path))
    path.write_text(json.dumps([*items, *({**item, "question": item["question"].upper()} for item in items)]))
    task = module_of(TASK).Task((1,))
    train, few, test = [task.draw(co.rng_of(0), split, 1, 300) for split in (co.TRAIN, co.VALIDATION, co.TEST)]
    assert len(train) == 300 and len({*train}) + len(few) + len(test) == len({*train, *few, *test}) == 60
    assert [(task.say(step), task.fields(step)) for step in task.work(5)] == [("a b", {}), ("", None), ("", None)]
    assert task.spell(task.work(5)) == "yes" and task.words.split()[:2] == ["a", "b"]
    assert [task.typed(line) for line in ("0", "119", "120", "-1", "x", "1" * 5000)] == [0, 119, *[None] * 4]
    wrong = [[*items, item] for item in ({"question": "x"}, {**items[0], "steps": "a b"}, {**items[0], "answer": 7})]
    for content in (None, "[", "{}", "[]", "7", *map(json.dumps, [items[:9], *wrong])):
        path.write_text(content) if content else path.unlink()
        assert co.command_line([*begin, "--digits", "1"]) == 2
        told = capsys.readouterr().err.splitlines()
        assert len(told) == 1 and told[0].startswith(f"error: COCONUT_JSON={path} is no list"), content
    done = cli(*begin)  # as a script, whose classes the task must see as its own
    assert done.returncode == 2 and list(tmp_path.iterdir()) == [path]
    assert done.stderr == "error: coconut_json.py has problems of one size: use --digits 1\n"

def test_the_comparison_goes_on_where_it_was_stopped(tmp_path, monkeypatch, narrow, capsys):
    """Finished runs are left alone, stopped ones resumed, those with other flags refused; the random row has trained
    readers of an untrained model, and the table the mean, least and most of each figure over seeds."""
    script = module_of(".scripts/compare.py")
    told = []

    def start(out, *flags):
        told.append((out.name, *flags))
        co.main([*flags, "--out", str(out)])

    monkeypatch.setattr(script, "start", start)
    monkeypatch.setenv("KINDS", "faithful none random")
    assert script.main(tmp_path, "2", "1", *SHORT) == 0
    told.clear()
    (tmp_path / "none-2/report.html").unlink()
    assert script.main(tmp_path, "2", "1", *SHORT) == 0 and len(told) == 1
    assert told[0][0] == "none-2" and "--resume" in told[0]
    table = json.loads((tmp_path / "compare.json").read_text())
    assert list(table) == ["faithful", "none", "random"]
    found = [co.load_json(tmp_path / f"faithful-{seed}/results.json")["causal"]["iia_same"]["exact"] for seed in (1, 2)]
    assert table["faithful"]["IIA same"] == {"1": found[0], "2": found[1]}
    assert "steps read" not in table["none"] and "answers" not in table["random"] and "LoRA" in table["random"]
    base = [(tmp_path / f"{name}-1/base/model.safetensors").read_bytes() for name in ("faithful", "random")]
    coconut = co.load_json(tmp_path / "random-1/config.json")
    assert base[0] == base[1] and coconut["train_latent"] == 0
    mean, least, most = (f"{x:.3f}" for x in (sum(found) / 2, min(found), max(found)))
    cell = mean if least == most else f"{mean} ({least}–{most})"
    told = (tmp_path / "compare.md").read_text()
    assert f"| IIA same | {cell} | - |" in told and told.endswith(f"by: {co.environment(co.parse([]))['git']}\n")
    assert script.main(tmp_path, "1", "1", *SHORT, "--eval-problems", "77") == 1
    assert capsys.readouterr().err.count("was trained with other flags: choose another folder\n") == 3

def test_multiplication_with_a_step_given():
    """Steps are those of the school method, and spell the product. A given step's digit and carry are worth what they
    stand for: the product changes by their difference, at that place."""
    task = module_of(str(HERE / ".tasks/multiply.py")).Task((2, 3))
    said = [task.say(step) for step in task.work((37, 85))]
    assert said == ["write 5 carry 3 is 7*5+0+0", "write 8 carry 1 is 3*5+0+3", "write 1",
                    "write 4 carry 6 is 7*8+8+0", "write 1 carry 3 is 3*8+1+6", "write 3"]
    for size in (2, 3):
        problems = task.draw(co.rng_of(1), co.TRAIN, size, 200)
        for (a, b), donor in zip(problems, problems[1:]):
            own, others = task.work((a, b)), task.work(donor)
            assert len(own) == size * (size + 1) and task.spell(own) == str(a * b)
            for slot, (mine, other) in enumerate(zip(own, others)):
                row, column = divmod(slot, size + 1)
                change = other[4] - mine[4] + (10 * (other[5] - mine[5]) if column < size else 0)
                worked = task.work((a, b), {slot: other})
                assert worked[:slot] == own[:slot] and worked[slot] == other
                assert int(task.spell(worked)) == a * b + change * 10 ** (row + column)
    assert task.text((37, 85)) == "37*85=" and task.looser(said[0]) == {"result": "write 5 carry 3"}
    assert [task.typed(line) for line in ("37*85", "37 * 85", "37+85", "3*85")] == [(37, 85)] * 2 + [None] * 2

def test_hops_with_a_step_given():
    """Each hop follows the problem's own map; after a given one the walk goes on from where that led, by that map."""
    task = module_of(str(HERE / ".tasks/hops.py")).Task()
    assert task.work(("3702914856", 4, 3)) == [(4, 9), (9, 6), (6, 4)]
    assert task.work(("3702914856", 4, 3), {1: (0, 2)}) == [(4, 9), (0, 2), (2, 0)]
    assert sum(task.never_read((a, b)) for a in range(10) for b in range(10)) == 10
    drawn = {split: set(task.draw(co.rng_of(0, split), split, 3, 300)) for split in (co.TRAIN, co.VALIDATION, co.TEST)}
    assert not drawn[co.TRAIN] & drawn[co.TEST] and len(drawn[co.TEST]) == 300

COUNT_DOWN = '''
class Task:
    """Count down from a digit: each step is one less."""
    FIELDS, words = {"left": 10}, "left"
    def __init__(self, sizes): pass
    def draw(self, rng, split, size, n): return [int(x) for x in rng.integers(size, 10, n)]
    def size(self, problem): return 3
    def text(self, problem): return f"{problem}>"
    def work(self, problem, given={}):
        steps = []
        for slot in range(3):
            left = (steps[-1] if steps else problem) - 1
            steps.append(given.get(slot, max(left, 0)))
        return steps
    def say(self, step): return f"left {step}"
    def spell(self, steps): return str(steps[-1])
    def fields(self, step): return {"left": step}
    def never_read(self, step): return False
    def typed(self, line): return int(line) if line.isdigit() and 3 <= int(line) < 10 else None
'''

def test_a_task_of_ones_own(tmp_path):
    """--task FILE.py runs whole, probes, exchanges and ask included; a mistake in it is one line and exit 2."""
    (tmp_path / "down.py").write_text(COUNT_DOWN)
    r = short(tmp_path / "run", "--task", str(tmp_path / "down.py"), "--digits", "3")
    assert set(r["probes"]["linear"]) == {"left", "step"} and r["causal"]["iia"]["n"] == 24
    told, err, code = asked(tmp_path / "run", "7", "swap 1 4")
    assert code == 0 and "left 6" in told and "<- of 4>" in told

@pytest.mark.parametrize("good, bad, says", [
    ("__init__(self, sizes): pass", "__init__(self, sizes): 1 / 0", "__init__: ZeroDivisionError"),
    ("class Task", "class Other", "no class Task"), ("def spell", "def spelt", "problem 8: .*no attribute .spell"),
    ("return str(steps", "return str(step", "problem 8: spell: NameError"),
    ("for slot in range(3)", "for slot in range(problem)", "problem 9: work: 9 steps, of others of its size 8"),
    ("given.get(slot, max(left, 0))", "max(left, 0)", "problem 9: work: a given step"),
    ("str(steps[-1])", "steps[-1]", "problem 8: .*TypeError"), ("{\"left\": step}", "{}", "problem 8: fields"),
    ("return [int(x)", "return 1 / 0, [int(x)", "size 3: draw: ZeroDivisionError"),
    ("{\"left\": 10}", "{\"left\": 8}", "problem 9: fields"), ("left\": step", "left\": \"x\"", "problem 8: fields"),
    ("return False", "return True", "size 3: fields, never_read"), ("{\"left\": step}", "None", "size 3: fields, never"),
    ("str(steps[-1])", "\"\\ud800\"", "problem 8: text, say and spell"),
    ("{\"left\": 10}", "{\"step\": 10}", "FIELDS has a name"), ("n)]", "n if split != 'train' else 0)]", "size 3: draw"),
    ("n)]", "n if split != 'test' else 3)]", "size 3: draw: .* 3 of 4 to test on"),
    ("def fields", "FIELDS = {\"?\" * 40: 10}\n    def fields(self, step): return {\"?\" * 40: step}\n    def no",
     "FIELDS: .* too long a question"),
    ("return False", "return False\n    def looser(self, said): return {'x': said[0]}", "problem 8: looser: IndexError"),
    ("size(self, problem): return 3", "size(self, problem): return 4", "size 3: size: another one")])
def test_a_mistake_in_a_task(tmp_path, capsys, good, bad, says):
    """It is one line that names the method and the problem, exit 2, and nothing is written."""
    assert COUNT_DOWN.count(good) == 1
    (tmp_path / "broken.py").write_text(COUNT_DOWN.replace(good, bad))
    args = ["--task", str(tmp_path / "broken.py"), "--digits", "3", "--out", str(tmp_path / "no")]
    assert co.command_line([*args, "--device", "cpu"]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(says, err) and not (tmp_path / "no").exists()
