"""No memory is a message, and any other error stays what it is."""

import pytest
import torch

from qlora.errors import MachineError
from qlora.hardware import ANSWERING_SETTINGS, TRAINING_SETTINGS, out_of_memory_named
from qlora.params import Params


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
)
@pytest.mark.parametrize("settings", [TRAINING_SETTINGS, ANSWERING_SETTINGS])
def test_no_memory_names_what_saves_most_and_its_values(default_params: Params, error: Exception, settings: tuple[str, ...]) -> None:
    with pytest.raises(MachineError) as raised, out_of_memory_named(settings, default_params):
        raise error
    assert (raised.value.code, raised.value.exit_code) == ("out-of-memory", 3)
    assert "more" not in raised.value.message
    for name in settings:
        section, key = name.split(".")
        assert f"{name} (now {getattr(getattr(default_params, section), key)!r})" in raised.value.message


def test_another_error_is_let_through(default_params: Params) -> None:
    with pytest.raises(RuntimeError, match="a bug"), out_of_memory_named(TRAINING_SETTINGS, default_params):
        raise RuntimeError("a bug")
