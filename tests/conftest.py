"""Fixtures that every test may use."""

import gc
import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from qlora.runtime import log

ROOT = Path(__file__).parents[1]
REAL = Path(os.environ.get("QLORA_REAL_DATA", ROOT.parent / "shared" / "real"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with long tests at the beginning of each process's share, a half of the list: a long one begun last would leave a core idle."""
    files = list(dict.fromkeys(item.path for item in items if item.get_closest_marker("slow")))
    halves = [[item for item in items if item.path in files[place::2]] for place in (0, 1)]
    others = [item for item in items if item.path not in files]
    middle = len(others) // 2
    items[:] = [*halves[0], *others[:middle], *halves[1], *others[middle:]]


def pytest_collection_finish() -> None:
    """What was imported stays until the end. The collector, which every training calls, and every forked process need not walk through it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _signals_as_in_a_terminal() -> None:
    """Begun in a shell's background, the tests would hand on to what they start that these are ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True, scope="session")
def _logged_lines_are_printed() -> None:
    """As in every program of the project, so that a test can read them from capsys."""
    log.configure()


@pytest.fixture(autouse=True)
def _from_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests run as stages do: from the repository's root, unaware of a DVC around them."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("DVC_ROOT", raising=False)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """Path of a real input; the test is skipped where it is absent."""

    def path_of(name: str) -> Path:
        path = REAL / name
        if not path.exists():
            pytest.skip(f"real input {name} is not at {REAL} (set QLORA_REAL_DATA)")
        return path

    return path_of
