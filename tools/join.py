"""Take part, from another machine, in the stages that the first machine runs with `hardware.num_machines` above 1.

python -m tools.join [--seconds 21600]     on each other machine
python -m tools.join --end                 on the first one, when its `dvc repro` has ended: the others end too, with 0

Runs in the project's folder, which all machines see, with MASTER_ADDR and MASTER_PORT set as on the first machine. It does its share of one
stage after another, until it is ended (SIGTERM, Ctrl-C) or nothing to run has come for so many seconds. docs/cluster.md shows it in a SLURM script.
"""

import argparse
import os
from pathlib import Path

from qlora import params
from qlora.runtime import command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=command.positive, default=21_600.0, help="how long to wait for the next stage (default: %(default)s)")
    parser.add_argument("--end", action="store_true", help="nothing more comes")
    arguments = parser.parse_args()
    # Else torch warns at every try to reach a machine that has not begun yet.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")
    from qlora.runtime import launcher  # noqa: PLC0415 - torch, which takes seconds

    if arguments.end:
        launcher.end_all(params.load(Path("params.yaml")).hardware.num_machines)
    else:
        launcher.join(arguments.seconds)


if __name__ == "__main__":
    command.run(main)
