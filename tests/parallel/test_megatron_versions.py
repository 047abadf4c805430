"""Supported and refused releases of Megatron-Core; one module handles the differences."""

from __future__ import annotations

import logging
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

from megatron_hydra.errors import HydraError
from megatron_hydra.parallel import megatron_versions
from tests.parallel.launch import ROOT


@pytest.mark.parametrize("version", ["0.16.1", "0.17.0", "0.18.2", "0.19.0rc1", "0.19.9"])
def test_supported_releases_are_taken(version: str) -> None:
    megatron_versions.check(version)


@pytest.mark.parametrize(
    ("version", "reason"),
    [("0.15.3", "old"), ("0.16.0", "old"), ("0.20.0rc0", "new"), ("0.20.0", "new"), ("1.0", "new")],
)
def test_others_are_refused_by_name_with_what_to_install(version: str, reason: str) -> None:
    with pytest.raises(HydraError) as refusal:
        megatron_versions.check(version)
    text = str(refusal.value)
    assert f"megatron-core {version} is installed, which is too {reason}" in text
    assert f"pip install '{megatron_versions.REQUIREMENT}'" in text


def test_the_version_is_that_of_the_package() -> None:
    import megatron.core

    assert megatron.core.__version__.startswith(megatron_versions.installed())


def test_pip_is_asked_for_the_same_range() -> None:
    body = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(line) for line in body["dependencies"]]
    (ours,) = (r for r in requirements if r.name == "megatron-core")
    assert ours.specifier == Requirement(megatron_versions.REQUIREMENT).specifier
    first, beyond = (".".join(map(str, version)) for version in megatron_versions.SUPPORTED)
    assert ours.specifier.contains(first) and not ours.specifier.contains(beyond)
    assert any(r.name == "triton" for r in requirements)  # `import megatron.core` needs it


def test_ci_runs_the_first_and_the_last_release_line() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text())
    pythons = workflow["jobs"]["gate"]["strategy"]["matrix"]["python"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [Requirement(line) for line in lines if line.startswith("megatron-core==")]
    taken = set()
    for python in pythons:
        (pin,) = (p for p in pins if p.marker and p.marker.evaluate({"python_version": python}))
        taken.add(megatron_versions.numbers(str(pin.specifier).removeprefix("==")))
    first, beyond = megatron_versions.SUPPORTED
    assert min(taken) == first
    assert max(taken)[:2] == (beyond[0], beyond[1] - 1)


def _start_with(folder: Path, package_info: str, *command: str) -> tuple[int, str]:
    """Run a command in an environment where ``import megatron.core`` fails."""
    core = folder / "megatron" / "core"
    core.mkdir(parents=True)
    (core / "__init__.py").write_text("raise RuntimeError('megatron.core was imported')\n")
    (core / "package_info.py").write_text(package_info)
    program = (
        "import runpy, sys; sys.path[:0] = sys.argv[1:3]; del sys.argv[1:3]; del sys.argv[0]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(folder), str(ROOT), *command],
        capture_output=True, text=True, check=False, cwd=folder, timeout=120,
    )  # fmt: skip
    return done.returncode, done.stderr


TOO_NEW = "MAJOR = 0\nMINOR = 20\nPATCH = 1\nPRE_RELEASE = ''\n"


@pytest.mark.parametrize(
    "command",
    [
        ["megatron_hydra/train.py", "--config", str(ROOT / "configs/tiny/finetune.yaml")],
        ["tools/hf_to_megatron.py", "--hf-path", "model", "--output", "out"],
    ],
    ids=["train", "convert"],
)
def test_a_command_refuses_the_release_before_it_imports_it(
    tmp_path: Path, command: list[str]
) -> None:
    script, *options = command
    status, errors = _start_with(tmp_path, TOO_NEW, str(ROOT / script), *options)
    assert (status, len(errors.splitlines())) == (2, 1), errors
    assert errors.startswith("error: megatron-core 0.20.1 is installed, which is too new")
    assert [path.name for path in tmp_path.iterdir()] == ["megatron"]  # nothing was started


def test_a_package_without_a_version_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Spec:
        origin = str(tmp_path / "__init__.py")

    monkeypatch.setattr(megatron_versions.importlib.util, "find_spec", lambda _: Spec)
    for content in (None, "MAJOR = 1\n", "MAJOR =\n"):
        if content is not None:
            (tmp_path / "package_info.py").write_text(content)
        with pytest.raises(HydraError, match=r"package_info\.py does not say which megatron-core"):
            megatron_versions.installed.__wrapped__()


def test_a_missing_package_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(megatron_versions.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(HydraError, match="megatron-core is not installed: pip install 'megatron"):
        megatron_versions.installed.__wrapped__()


def test_expected_warnings_are_kept_out_and_others_are_not(
    caplog: pytest.LogCaptureFixture,
) -> None:
    megatron_versions.quiet()
    for name, beginning in megatron_versions._EXPECTED.items():
        logging.getLogger(name).warning("%s and so on", beginning)
        logging.getLogger(name).warning("another thing")
    assert {record.getMessage() for record in caplog.records} == {"another thing"}


_ASKS = re.compile(
    r"package_info|megatron\.core\.__version__|metadata\.version\(\W*megatron|megatron_versions\._"
)


def test_only_one_module_asks_for_the_release() -> None:
    """One file has all code that depends on the release."""
    own = Path(megatron_versions.__file__)
    asking = [
        path.name
        for path in (ROOT / "megatron_hydra").rglob("*.py")
        if path != own and _ASKS.search(path.read_text())
    ]
    assert not asking
    assert _ASKS.search(own.read_text())


def test_the_distributed_optimizer_does_not_warn_of_its_own_views() -> None:
    """It resets the gradients of views of fp32 parameters in every run; the warning helps no user."""
    program = (
        "import megatron_hydra, torch\n"
        "from megatron.core.optimizer.optimizer import _zero_grad_group_helper\n"
        "_zero_grad_group_helper([torch.ones(2, requires_grad=True).view(2)], True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr
    assert ".grad attribute" not in done.stderr
