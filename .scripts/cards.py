"""Model cards: a README.md beside each saved model of a finished run: what it is, how to load it in
plain transformers and think one problem, and its figures.

    python .scripts/cards.py [cocoracle.py's flags, as for the run]
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cocoracle as co  # noqa: E402

MODELS = {"base": "after stage 0, all text; or the released GPT-2",
          "coconut": "the model that thinks",
          "oracle": "the coconut, fine-tuned to read the thoughts of its former self",
          "lora": "an adapter of base, trained to read the coconut's thoughts"}
CARD = """# {name}: {role}

Of a run of cocoracle.py: `{config}`.

A prompt is `{problem}<bot>`; then come the steps as text, each ended by `<sep>`, or thoughts; then
`<eot>` and the answer. The model that thinks, in plain transformers:

```python
import torch
from transformers import AutoTokenizer, GPT2LMHeadModel
tokenizer = AutoTokenizer.from_pretrained("coconut")
model = GPT2LMHeadModel.from_pretrained("coconut").eval()
ids = tokenizer({prompt!r}, return_tensors="pt").input_ids
out = model.transformer(ids)
for slot in range({count}):  # {fed}
    x = {x}
    out = model.transformer(inputs_embeds=x, past_key_values=out.past_key_values)
seen, answer = [{seen}] * ids.shape[1] + [1] * {count}, tokenizer("<eot>").input_ids
while answer[-1] != model.config.eos_token_id and len(answer) < 100:
    seen.append(1)
    out = model.transformer(torch.tensor([answer[-1:]]), past_key_values=out.past_key_values,
                            attention_mask=torch.tensor([seen]))
    answer.append(model.lm_head(out.last_hidden_state[0, -1]).argmax().item())
print(tokenizer.decode(answer[1:-1]))  # {answer}
```

{told}

```{tables}
```
"""

def write_cards(cfg):
    """A model card, README.md, in the folder of each model."""
    out, results = Path(cfg.out), co.load_json(Path(cfg.out) / "results.json")
    if "examples" not in results:
        raise co.UserError(f"{out} has no finished run: python cocoracle.py --out {out} first")
    view, kind = results["examples"][0], co.KINDS[results["config"]["thoughts"]]
    own = "out.last_hidden_state[:, -1:]"
    filled = {
        "config": json.dumps(results["config"]), "problem": view["problem"],
        "prompt": view["problem"] + "<bot>", "answer": view["answer"],
        "count": len(view["said"]), "told": co.headline(results), "tables": co.tables(results),
        "fed": "a thought is fed " + ("<bot>" if kind.pause else "the last hidden state"),
        "x": "model.transformer.wte(ids[:, -1:])" if kind.pause else own,
        "seen": int(not kind.bottleneck)}
    for name, role in MODELS.items():
        if (out / name).exists():
            co.write_atomic(out / name / "README.md", CARD.format(name=name, role=role, **filled))

if __name__ == "__main__":
    try:
        write_cards(co.parse(sys.argv[1:]))
    except co.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
