"""Memory of a training step from released weights, worked out without a GPU or the memory: weights,
gradients, moments (Muon has one, AdamW two), and what is kept for going backwards, of the longest
problems.

    python .scripts/memory.py --model gpt2-large --batch-size 16

With cocoracle.py's flags; bfloat16 unless told. The tensors are fake ones (torch's FakeTensorMode),
which have shapes and no numbers. Attention's probabilities are counted, which a GPU's kernels do
not keep; what the allocator and the compiler waste is not.
"""

import sys
from pathlib import Path

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cocoracle as co  # noqa: E402

N_VOCAB, GB = 50261, 1e9

def kept(model, loss_of):
    """Bytes that a loss keeps for going backwards, each storage once, those of parameters aside."""
    parameters = {p.untyped_storage()._cdata for p in model.parameters()}
    storages = {}

    def pack(x):
        storage = x.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = storage  # held, so that no other gets its number
        return x

    with saved_tensors_hooks(pack, lambda x: x):
        loss_of()
    return sum(storage.nbytes() for storage in storages.values())

def memory(run):
    """-> {what: bytes}, of one part of a step."""
    size = (max(run.cfg.digits),)
    run = run._replace(cfg=co.dataclasses.replace(run.cfg, digits=size))
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = co.GPT(N_VOCAB, *run.cfg.size, run.cfg.layer)
        optimizers = co.make_optimizers(run, model, run.cfg.recipes["explained"])
        trained = [sum(p.numel() for p in optimizer.param_groups[0]["params"]) for optimizer in optimizers]
        weights = 4 * sum(trained)
        found = {"weights": weights, "gradients": weights, "moments": 4 * (2 * trained[0] + trained[1])}

        def loss_of():
            with co.precision(run, model):
                co.coconut_loss(run, model, stage, co.rng_of(0, step))

        for name, stage in (("text", "0"), ("all thoughts", "all")):
            found[f"kept, {name}"] = 0
            for step in range(3):  # with and without an exchange
                found[f"kept, {name}"] = max(found[f"kept, {name}"], kept(model, loss_of))
    most = max(found["kept, text"], found["kept, all thoughts"])
    return {**found, "in all": 2 * weights + found["moments"] + most}

def main(argv):
    flags = argv if "--dtype" in argv else [*argv, "--dtype", "bfloat16"]
    run = co.open_run(co.parse([*flags, "--init", "scratch", "--device", "cpu"]))
    for name, size in memory(run).items():
        print(f"{name:<20}{size / GB:8.2f} GB")

if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except co.UserError as e:
        sys.exit(f"error: {e}")
