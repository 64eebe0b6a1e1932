"""No memory is a message, and any other error stays what it is."""

from pathlib import Path

import pytest
import torch

from qlora.core.errors import InputError, MachineError
from qlora.model import device
from qlora.model.device import PREDICTION_SETTINGS, TRAINING_SETTINGS, set_up_device, translate_out_of_memory
from qlora.params import Params
from qlora.runtime.gpus import require_devices


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("settings", [TRAINING_SETTINGS, PREDICTION_SETTINGS])
def test_no_memory_names_what_saves_most_and_its_values(default_params: Params, error: Exception, settings: tuple[str, ...]) -> None:
    with pytest.raises(MachineError) as raised, translate_out_of_memory(settings, default_params):
        raise error
    assert (raised.value.code, raised.value.exit_code) == ("out-of-memory", 3)
    assert "more" not in raised.value.message
    for name in settings:
        section, key = name.split(".")
        assert f"{name} (now {getattr(getattr(default_params, section), key)!r})" in raised.value.message


def test_another_error_is_let_through(default_params: Params) -> None:
    with pytest.raises(RuntimeError, match="a bug"), translate_out_of_memory(TRAINING_SETTINGS, default_params):
        raise RuntimeError("a bug")


def test_a_missing_gpu_is_the_machines(default_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    asked = default_params.hardware.model_copy(update={"device": "cuda"})
    for call in (lambda: require_devices(asked), lambda: set_up_device(asked, deterministic=True)):
        with pytest.raises(MachineError, match=r"\[no-gpu\]"):
            call()


def test_each_process_needs_a_gpu_of_its_own(default_params: Params, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for count in (1, 2):
        require_devices(default_params.hardware.model_copy(update={"device": "cuda", "num_processes": count}))
    with pytest.raises(MachineError, match=r"\[too-few-gpus\] hardware.num_processes = 3, but torch sees 2 GPU"):
        require_devices(default_params.hardware.model_copy(update={"device": "cuda", "num_processes": 3}))


@pytest.mark.parametrize(
    ("missing", "words"),
    [("gcc", r"there is no C compiler \(gcc\): `apt-get install gcc`"), ("Python.h", r"Python.h is missing: `apt-get install python3.\d+-dev`")],
)
def test_what_the_loss_is_compiled_with_is_missed_before_the_baseline(
    default_params: Params, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, missing: str, words: str
) -> None:
    monkeypatch.setattr(device, "find_spec", lambda _: "triton is there")
    monkeypatch.setattr(device.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(device.shutil, "which", lambda name: None if missing == "gcc" else f"/usr/bin/{name}")
    hardware = default_params.hardware.model_copy(update={"device": "cuda"})
    with pytest.raises(MachineError, match=rf"\[compiler-missing\] .*{words}") as caught:
        device.require_compiler(hardware)
    assert caught.value.exit_code == 3
    # Where nothing is missing, or nothing is compiled.
    (tmp_path / "Python.h").touch()
    monkeypatch.setattr(device.shutil, "which", lambda name: f"/usr/bin/{name}")
    device.require_compiler(hardware)
    (tmp_path / "Python.h").unlink()
    monkeypatch.setattr(device, "find_spec", lambda _: None)
    device.require_compiler(hardware)


def test_a_process_too_few_is_refused(default_params: Params) -> None:
    with pytest.raises(InputError, match=r"\[processes-differ\] 1 process\(es\) were launched, hardware.num_processes asks for 2"):
        set_up_device(default_params.hardware, deterministic=True, processes=2)
