"""GGUF files by llama.cpp's own converter, where it is installed."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from qlora.core.errors import MachineError

CONVERTER = "convert_hf_to_gguf.py"
VARIABLE = "LLAMA_CPP"
SHOWN_LINES = 8
"""Of what a failed converter said last."""
TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def find_converter(given: str) -> Path:
    """The converter: a file, the folder of llama.cpp, or with nothing given that of LLAMA_CPP, or the one on PATH.

    Raises:
        MachineError: it is not there.
    """
    place = given or os.environ.get(VARIABLE) or shutil.which(CONVERTER)
    for path in (Path(place), Path(place) / CONVERTER) if place else ():
        if path.is_file():
            return path
    raise MachineError(
        "gguf-converter",
        f"{CONVERTER} is not {f'at {place}' if place else 'on PATH'}: clone llama.cpp, install its requirements, "
        f"and give its folder by --gguf DIR or {VARIABLE}",
    )


def convert(converter: Path, model: Path, target: Path, dtype: str) -> None:
    """Write the merged model in `model` as a GGUF file.

    Raises:
        MachineError: the converter failed, with the end of what it said.
    """
    command = [sys.executable, str(converter), str(model), "--outfile", str(target), "--outtype", TYPES[dtype]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace", check=False)
    if done.returncode or not target.is_file():
        said = "\n".join(done.stdout.splitlines()[-SHOWN_LINES:])
        raise MachineError("gguf-failed", f"{converter} ended with {done.returncode} and no {target.name}:\n{said}")
