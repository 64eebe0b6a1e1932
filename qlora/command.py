"""What every stage and tool shares as a program: exit codes, and messages in place of tracebacks."""

import errno
import sys
from collections.abc import Callable

from qlora.errors import UserFacingError

_UNABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.ENOTDIR, errno.EISDIR}


def run(main: Callable[[], None]) -> None:
    """Run `main` and end the process: 0 done, 2 wrong input, 3 unable machine; a bug keeps its traceback and exit code 1."""
    try:
        main()
    except UserFacingError as error:
        _stop(str(error), error.exit_code)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and error.filename:
            _stop(f"[input-missing] {error.filename} does not exist: `dvc repro` makes what a stage reads.", 2)
        if error.errno not in _UNABLE:
            raise
        place = error.filename2 or error.filename or "the output"
        _stop(f"[file-access] {place}: {error.strerror}. Make room, or give this user the right to use it, then run again.", 3)
    except KeyboardInterrupt:
        _stop("interrupted", 130)


def _stop(message: str, exit_code: int) -> None:
    print(f"\nerror: {message}", file=sys.stderr, flush=True)
    sys.exit(exit_code)
