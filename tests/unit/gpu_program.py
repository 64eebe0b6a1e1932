"""A stage in small for test_gpus.py: `python -m tests.unit.gpu_program FOLDER NEEDED SECONDS ROUNDS NAME...`.

Takes as many of the named GPUs, begins anew where it sees others too, notes the interval in FOLDER/log and holds them for so long.
"""

import os
import sys
import time
from pathlib import Path

from qlora.runtime import command, gpus


def main() -> None:
    folder, names = Path(sys.argv[1]), sys.argv[5:]
    for _ in range(int(sys.argv[4])):
        taken = None
        if not gpus.has_lease():
            taken = gpus.acquire(int(sys.argv[2]), names, folder)
            if sys.argv[4] == "1" and taken.names != names:
                gpus.reexec(taken)
        seen = ",".join(taken.names) if taken else os.environ[gpus.VISIBLE]
        began = time.monotonic()
        print(f"has {seen}", flush=True)
        time.sleep(float(sys.argv[3]))
        with (folder / "log").open("a", encoding="utf-8") as log:
            log.write(f"{began} {time.monotonic()} {seen} {os.getpid()}\n")
        if taken:
            taken.release()


if __name__ == "__main__":
    command.run(main)
