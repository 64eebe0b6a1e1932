"""What every stage and tool shares as a program: arguments, exit codes, and messages in place of tracebacks."""

import argparse
import gc
import inspect
import io
import os
import signal
import stat
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.core.errors import StoppedError, UserFacingError, machine_error
from qlora.core.text import in_shell, visible
from qlora.runtime import log
from qlora.runtime.signals import LAUNCHER, SIGNALS, handle, ignore

if TYPE_CHECKING:
    from qlora.params import Params

READER_GONE = 128 + signal.SIGPIPE
"""Exit code when nobody reads the output any more, as of programs that SIGPIPE ends."""


def positive(text: str) -> float:
    """A finite number above 0, for arguments and variables.

    Raises:
        ValueError: it is none.
    """
    value = float(text)
    if not 0 < value < float("inf"):
        raise ValueError(f"{text} is not a finite number above 0")
    return value


def positive_int(text: str) -> int:
    """A whole number above 0, for arguments.

    Raises:
        ValueError: it is none.
    """
    value = int(text)
    if value < 1:
        raise ValueError(f"{text} is not a whole number above 0")
    return value


def stage_inputs(stage: Callable[..., None], description: str | None) -> "tuple[Params, dict[str, Any]]":
    """Params and paths of a stage's program. Each keyword-only argument of the stage function, a path, is a flag of the command line.

    Raises:
        InputError: params.yaml is wrong.
        MachineError: the installed packages are not those of requirements.txt.
    """
    from qlora import params  # noqa: PLC0415 - a tenth of a second that a tool's --help need not take
    from qlora.core import environment  # noqa: PLC0415

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, parameter in inspect.signature(stage).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            parser.add_argument(f"--{name.replace('_', '-')}", type=Path, required=parameter.default is parameter.empty)
    paths = vars(parser.parse_args())
    values = params.load(Path("params.yaml"))
    environment.require_pinned_versions(Path("requirements.txt"), allow_other=values.runtime.allow_other_versions)
    return values, paths


def run(main: Callable[[], None]) -> None:
    """Run `main` and end the process: 0 done, 2 wrong input, 3 unable machine, 75 stopped; a bug keeps its traceback and exit code 1."""
    handle(SIGNALS, _raise_stopped)
    for stream in (sys.stdout, sys.stderr):
        # Under LC_ALL=C what is not ASCII is spelled out.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    log.configure()
    # What was imported until now is never garbage.
    gc.freeze()
    gc.enable()
    try:
        main()
        if LAUNCHER in os.environ:
            _end(0)
    except UserFacingError as error:
        _stop(str(error), error.exit_code)
    except BrokenPipeError:
        if not stat.S_ISFIFO(os.fstat(sys.stdout.fileno()).st_mode):
            raise
        # At its end the interpreter would write what is left.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        _end(READER_GONE)
    except FileNotFoundError as error:
        if not error.filename:
            raise
        _stop(f"[input-missing] {error.filename} does not exist: `dvc repro` makes what a stage reads.", 2)
    except MemoryError as error:
        _stop(f"[out-of-memory] no memory is left ({error}): use a machine with more, or a smaller file.", 3)
    except Exception as error:
        # The CPU's allocator of torch has no class of its own.
        if "can't allocate memory" in str(error):
            _stop(f"[out-of-memory] no memory is left ({str(error).splitlines()[0]}): use a machine with more, or a smaller file.", 3)
        if unable := machine_error(error, "the output"):
            _stop(str(unable), unable.exit_code)
        if LAUNCHER not in os.environ:
            raise
        traceback.print_exc()
        _end(1)
    except BaseException as error:
        # Of libraries in Rust, such as tokenizers: a pattern of tokenizer.json may give up on a certain text alone, in the middle of the data.
        if type(error).__name__ != "PanicException":
            raise
        _stop(
            f"[tokenizer-unloadable] a library in Rust gave up ({str(error)[:1000]}), most often on the base model's tokenizer: pin another one.", 2
        )


def say(text: str, *, as_error: bool = False) -> None:
    """Print what may hold text of others (names of files, categories, what a library said): nothing in it controls the terminal."""
    print(visible(text), file=sys.stderr if as_error else sys.stdout, flush=True)


def _raise_stopped(number: int, _frame: object) -> None:
    """So that what is half-written is removed on the way out."""
    ignore(SIGNALS)
    raise StoppedError("stopped", f"{signal.Signals(number).name}: nothing was written, run again")


def _stop(message: str, exit_code: int) -> None:
    kind = "stopped" if exit_code == StoppedError.exit_code else "error"
    if kind == "error" and "DVC_STAGE" in os.environ and LAUNCHER not in os.environ:
        from qlora.runtime import restoring  # noqa: PLC0415 - a tool's --help need not load what reads dvc.lock

        message += restoring.advice()
    root = Path(__file__).parents[2]
    if not Path("dvc.yaml").exists() and not root.samefile(Path.cwd()):
        message += f"\nThis is not the repository's root: `cd {in_shell(root)}` first."
    # A message may name what stands in a file.
    print(f"\n{kind}: {visible(message)}", file=sys.stderr, flush=True)
    _end(exit_code)


def _end(exit_code: int) -> None:
    if LAUNCHER in os.environ:
        # At the interpreter's end, what is left of the communication may wait for processes that are gone, or abort.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    sys.exit(exit_code)
