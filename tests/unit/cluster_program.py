"""A program that launches rank_program.py on a Ray cluster: `python -m tests.unit.cluster_program NAME=VALUE... -- ACTION RANK...`.

NAME=VALUE are values of params.yaml's section `hardware`, constants of the launcher in capitals, or `count`: of processes, num_processes without it.
"""

import sys
from pathlib import Path

from qlora import params
from qlora.runtime import command, ranks, ray_launcher


def main() -> None:
    end = sys.argv.index("--")
    values = dict(argument.split("=") for argument in sys.argv[1:end])
    for module in (ranks, ray_launcher):
        vars(module).update({name: float(value) for name, value in values.items() if name.isupper()})
    count = values.pop("count", values["num_processes"])
    changed = {name: value if name == "device" else int(value) for name, value in values.items() if name.islower()}
    hardware = params.load(Path("params.yaml")).hardware.model_copy(update=changed)
    ray_launcher.launch("tests.unit.rank_program", sys.argv[end + 1 :], hardware, int(count))


if __name__ == "__main__":
    command.run(main)
