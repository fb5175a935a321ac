"""One peer of the benchmark: `worker.py KIND FOLDER --threads N --variant NAME`.

FOLDER holds plan.json (sizes, written by the driver) and the same tensors or frames that our side reads. Imports
wait until the number of threads is known, because numerical libraries read it when they are loaded.
"""

import argparse
import importlib
import json
import os
import pathlib
import sys
import time

KINDS = ["training", "embed", "data", "evaluate", "forgetting_run"]


def own_the_output():
    """Answers go to the real standard output; whatever a library prints goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return answers


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--variant", required=True)
    arguments = parser.parse_args()

    answers = own_the_output()
    plan = json.loads((arguments.folder / "plan.json").read_text())
    side = importlib.import_module(arguments.kind).Side(plan, arguments)
    for _ in range(plan["warm_up"]):
        side.repeat()
    ready = {"description": side.description, "versions": side.versions, "check": side.check}
    print(json.dumps(ready), file=answers, flush=True)

    for line in sys.stdin:
        if line.strip() != "go":
            sys.exit(f"worker.py: expected go, got {line!r}")
        wall, cpu = time.perf_counter(), side.cpu_seconds()
        side.repeat()
        wall, cpu = time.perf_counter() - wall, side.cpu_seconds() - cpu
        print(json.dumps({"wall_s": wall, "cpu_s": cpu, "check": side.check}), file=answers, flush=True)


if __name__ == "__main__":
    main()
