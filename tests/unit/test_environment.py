import re
from importlib import metadata
from pathlib import Path

import pytest

from qlora.core.environment import pinned_packages, require_pinned_versions
from qlora.core.errors import InputError, MachineError


def requirements(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "requirements.txt"
    path.write_text(text, encoding="utf-8")
    return path


def test_the_committed_requirements_are_installed() -> None:
    require_pinned_versions(Path("requirements.txt"), allow_other=False)


def test_the_hashes_are_of_the_pinned_versions() -> None:
    pins = dict(re.findall(r"^([\w.-]+)==([^\s;]+)", Path("requirements.txt").read_text(encoding="utf-8"), re.MULTILINE))
    entries = re.findall(
        r"^([\w.-]+)==(\S+)((?: \\\n    --hash=sha256:[0-9a-f]{64})+)$", Path("requirements-hashes.txt").read_text(encoding="utf-8"), re.MULTILINE
    )

    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    assert {normal(name): version for name, version, _ in entries} == {normal(name): version for name, version in pins.items() if name != "torch"}


def test_local_build_tags_do_not_count(tmp_path: Path) -> None:
    version = metadata.version("torch").split("+")[0]
    require_pinned_versions(requirements(tmp_path, f"# why\ntorch=={version}  # comment\n"), allow_other=False)


def test_every_difference_is_named(tmp_path: Path) -> None:
    path = requirements(tmp_path, "tqdm==0.0.1\nno-such-package==1.0\n")
    with pytest.raises(MachineError) as caught:
        require_pinned_versions(path, allow_other=False)
    assert (caught.value.code, caught.value.exit_code) == ("environment-differs", 3)
    assert f"tqdm: {metadata.version('tqdm')} in place of 0.0.1" in str(caught.value)
    assert "no-such-package: not installed in place of 1.0" in str(caught.value)


def test_other_versions_are_a_warning_when_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require_pinned_versions(requirements(tmp_path, "tqdm==0.0.1\n"), allow_other=True)
    assert "results may differ" in capsys.readouterr().err


def test_an_open_range_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\[requirements-unpinned\] .*'tqdm>=1' is not pinned"):
        require_pinned_versions(requirements(tmp_path, "tqdm>=1\n"), allow_other=False)


@pytest.mark.parametrize("content", [b"torch==2\xb4", b"==5"])
def test_a_damaged_list_of_packages_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "requirements.txt"
    path.write_bytes(content)
    with pytest.raises(InputError, match="requirements-unpinned"):
        pinned_packages(path)
