"""Figures of a finished run by size of its problems, 1,000 of each, as a table.

    python .scripts/sizes.py OUT [PROBLEMS]
"""

import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cocoracle as co  # noqa: E402

def table(out, n=1000):
    """-> lines of Markdown: a row for each size."""
    run, model, oracle = co.load(out)
    lines = ["| size | n | answers | steps read | never read before | IIA changed | IIA flow | said after |",
             "|---|---|---|---|---|---|---|---|"]
    for size in run.cfg.digits:
        one = run._replace(cfg=dataclasses.replace(run.cfg, digits=(size,), eval_problems=n))
        tests = [co.solve(one, model, problems) for problems in co.held_out(one, 500)]
        right = co.rate(sum([co.as_worked(one, test) for test in tests], []))
        known, never = co.cases_of(run.task, tests)
        read = co.oracle_scores(one, oracle, known, never, ["step"])
        causal = co.causal_scores(one, model, oracle, tests)
        shares = [right["exact"]]
        shares += [read.get(name, {}).get("exact_no_final") for name in ("step", "never_read")]
        shares += [causal.get(name, {}).get("exact") for name in ("iia_changed", "iia_flow", "said_after")]
        cells = ["-" if share is None else f"{share:.3f}" for share in shares]
        lines.append(" | ".join([f"| {size}", str(right["n"]), *cells]) + " |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines

if __name__ == "__main__":
    try:
        print(*table(sys.argv[1], *map(int, sys.argv[2:])), sep="\n")
    except co.UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
