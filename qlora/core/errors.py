"""Errors that a user can act on. Each names the place, the value and the way out, and carries a stable code.

UserFacingError
├── InputError      exit 2: params, data or model are wrong
├── MachineError    exit 3: this machine or environment is not able
└── StoppedError    exit 75: a signal stopped the work; run again to resume
"""

LOST_PEERS = 76
"""Exit code of a process that stopped because another one of the same run had: the launcher reports that other one."""


class UserFacingError(Exception):
    """Shown as one message without a traceback; any other exception is a bug.

    Args:
        code: Stable key of docs/troubleshooting.md, such as "data-missing".
        message: What is wrong, where, with which value, and what to do.
    """

    exit_code = 1

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"[{code}] {message}")
        self.code = code
        self.message = message

    def __reduce__(self) -> tuple[type["UserFacingError"], tuple[str, str]]:
        """Errors travel from a worker process to the one that shows them."""
        return type(self), (self.code, self.message)


class InputError(UserFacingError):
    exit_code = 2


class MachineError(UserFacingError):
    exit_code = 3


class StoppedError(UserFacingError):
    exit_code = 75
