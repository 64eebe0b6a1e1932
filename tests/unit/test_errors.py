"""Errors of libraries become one message: by their kind, with the file's name."""

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from qlora.core.errors import InputError, MachineError, StoppedError, machine_error, translate_errors

FILES_LEFT = 10


def translated(raised: BaseException) -> BaseException:
    """What an error becomes."""
    try:
        with translate_errors("a-code", "a.json", "is not a file of ours", "write it again"):
            raise raised
    except BaseException as error:
        return error
    raise AssertionError


@pytest.mark.parametrize(
    "raised",
    [
        ValueError("no"),
        KeyError("no"),
        RecursionError("no"),
        ZeroDivisionError("no"),
        OverflowError("no"),
        ImportError("no"),
        RuntimeError("no"),
        SafetensorError("no"),
        OSError("no"),
        type("PanicException", (BaseException,), {})("no"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_library_raises_on_a_file_names_it(raised: BaseException) -> None:
    found = translated(raised)
    assert isinstance(found, InputError)
    assert found.code == "a-code"
    assert found.message.startswith(f"a.json is not a file of ours ({type(raised).__name__}: ")
    assert found.message.endswith("): write it again")


@pytest.mark.parametrize(
    "raised",
    [
        InputError("other", "no"),
        StoppedError("stopped", "no"),
        MemoryError("no"),
        KeyboardInterrupt(),
        torch.OutOfMemoryError("no"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("CUDA error: no kernel image is available"),
    ],
    ids=repr,
)
def test_what_is_not_the_file_s_fault_stays_what_it_is(raised: BaseException) -> None:
    assert translated(raised) is raised


@pytest.mark.parametrize(
    ("raised", "shown"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "b"), "b: No space left on device: make room"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "a.json: Disk quota exceeded: make room"),
        (OSError(errno.EFBIG, "File too large", "b"), "b: File too large: raise `ulimit -f`"),
        (OSError(errno.ENFILE, "Too many open files in system", "b"), "b: Too many open files in system: .*`ulimit -n`"),
        (OSError(errno.EMFILE, "Too many open files", "b"), "b: Too many open files: .*`ulimit -n`"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "b"), "b: File name too long: give it a shorter name"),
        (OSError(errno.EIO, "Input/output error", "b"), "b: Input/output error: the disk"),
        (OSError(errno.EISDIR, "Is a directory", "b"), "b: Is a directory: something else lies there"),
        (PermissionError(errno.EACCES, "Permission denied", "b"), "b: Permission denied: give this user the right"),
        (SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"), "a.json: .*No space left.*: make room"),
        (SafetensorError("Error: I/O error: File too large (os error 27)"), "a.json: .*`ulimit -f`"),
    ],
    ids=lambda value: value if isinstance(value, str) else repr(value),
)
def test_limits_of_the_machine_are_its_own_errors(raised: Exception, shown: str) -> None:
    found = translated(raised)
    assert isinstance(found, MachineError)
    with pytest.raises(MachineError, match=rf"\[file-access\] {shown}"):
        raise found


def test_an_error_of_ours_is_no_limit_of_the_machine() -> None:
    assert machine_error(OSError(errno.EINVAL, "Invalid argument", "b"), "a") is None
    assert machine_error(ValueError("no"), "a") is None


def limited(limit: int, most: int, code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A program of this project, with a limit of the system on it."""
    text = f"""
from pathlib import Path
from qlora.runtime import command
def main():
    {code}
command.run(main)
"""
    return subprocess.run(
        [sys.executable, "-c", text],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        preexec_fn=lambda: resource.setrlimit(limit, (most, most)),
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("limit", "most", "code", "shown"),
    [
        (resource.RLIMIT_FSIZE, 1000, "from qlora.core.files import write_json; write_json(Path('a.json'), {'a': 'x' * 10000})", "File too large"),
        (resource.RLIMIT_NOFILE, FILES_LEFT, "held = [open('/dev/null') for _ in range(100)]", "/dev/null: Too many open files"),
        (resource.RLIMIT_CORE, 0, "Path('x' * 300).read_text()", "File name too long"),
    ],
    ids=["file too large", "too many files", "name too long"],
)
def test_a_limit_ends_a_program_with_one_message(limit: int, most: int, code: str, shown: str, tmp_path: Path) -> None:
    done = limited(limit, most, code, tmp_path)
    assert (done.returncode, "[file-access]" in done.stderr, shown in done.stderr, "Traceback" in done.stderr) == (3, True, True, False), done.stderr
    assert list(tmp_path.iterdir()) == []


def test_safetensors_says_so_too_when_its_file_grows_too_large(tmp_path: Path) -> None:
    code = "import torch; from safetensors.torch import save_file; save_file({'a': torch.zeros(10000)}, 'a.safetensors')"
    done = limited(resource.RLIMIT_FSIZE, 1000, code, tmp_path)
    assert (done.returncode, "[file-access]" in done.stderr, "ulimit -f" in done.stderr, "Traceback" in done.stderr) == (3, True, True, False), (
        done.stderr
    )


@pytest.mark.parametrize("locale", [{}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}], ids=["utf-8", "ascii"])
def test_text_that_the_terminal_has_no_characters_for_is_spelled_out(locale: dict[str, str], tmp_path: Path) -> None:
    code = "print('東京'); raise __import__('qlora.core.errors').core.errors.InputError('a', 'é')"
    text = f"from qlora.runtime import command\ndef main():\n    {code}\ncommand.run(main)\n"
    (tmp_path / "program.py").write_text(text, encoding="utf-8")
    environment = {**os.environ, **locale, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, check=False)
    shown = (done.stdout + done.stderr).decode()
    assert done.returncode == 2, shown
    assert "Traceback" not in shown
    assert ("東京" in shown and "é" in shown) if not locale else ("\\u6771" in shown and "\\xe9" in shown)


def test_a_reader_that_ends_first_is_no_error(tmp_path: Path) -> None:
    text = "from qlora.runtime import command\ndef main():\n    for _ in range(100000): command.say('line')\ncommand.run(main)\n"
    (tmp_path / "program.py").write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        ["/bin/bash", "-c", f"set -o pipefail; {sys.executable} program.py | head -1"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (141, "line\n", "")


def raises(action: Callable[[], object]) -> str:
    with pytest.raises((InputError, MachineError)) as found:
        action()
    return str(found.value)


def test_a_full_disk_while_the_adapter_is_saved_names_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from qlora.model import adapter

    class Model:
        def save_pretrained(self, *_: object, **__: object) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    text = raises(lambda: adapter.publish(Model(), None, tmp_path / "adapter", "tiny"))
    assert text.startswith(f"[file-access] {tmp_path / 'adapter.partial'}: ")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize(
    "text", ["CUDA unknown error", "No CUDA GPUs are available", "Found no NVIDIA driver on your system", "cuDNN error: X", "NCCL error in: x"]
)
def test_a_failing_gpu_is_not_the_file_s_fault(text: str) -> None:
    raised = RuntimeError(text)
    assert translated(raised) is raised


def test_without_git_a_refusal_under_dvc_keeps_its_message(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    text = "from qlora.core.errors import InputError\nfrom qlora.runtime import command\ndef main():\n    raise InputError('a-code', 'a message')\n"
    (tmp_path / "program.py").write_text(f"{text}command.run(main)\n", encoding="utf-8")
    environment = {"PATH": "/nowhere", "PYTHONPATH": str(root), "DVC_STAGE": "train", "DVC_ROOT": str(tmp_path)}
    done = subprocess.run([sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, "[a-code] a message" in done.stderr, "Traceback" in done.stderr) == (2, True, False), done.stderr
    assert "dvc repro train" in done.stderr
