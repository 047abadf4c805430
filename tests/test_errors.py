"""The end of a command: every error that a user can fix gives one line and an exit status."""

from __future__ import annotations

import os

import pytest

from megatron_hydra.errors import HydraError, command


def ended(act, capsys):
    """Exit status and stderr of a command that runs ``act``."""
    status = command(act)()
    return status, capsys.readouterr().err


def test_a_good_end_has_the_commands_own_status(capsys):
    assert ended(lambda: None, capsys) == (0, "")
    assert ended(lambda: 85, capsys) == (85, "")


def test_an_error_is_a_line_and_status_2(capsys, monkeypatch):
    def refuse():
        raise HydraError("x.yaml: no")

    assert ended(refuse, capsys) == (2, "error: x.yaml: no\n")
    monkeypatch.setenv("MEGATRON_HYDRA_TRACEBACK", "1")
    with pytest.raises(HydraError):
        ended(refuse, capsys)


def test_a_file_that_cannot_be_used_is_named(tmp_path, capsys, monkeypatch):
    long = tmp_path / ("x" * 300)
    status, text = ended(long.stat, capsys)
    assert status == 1
    assert text == f"error: {long}: File name too long\n"
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    status, text = ended(lambda: os.replace(tmp_path / "file", tmp_path / "folder"), capsys)
    assert status == 1
    assert text == f"error: {tmp_path / 'folder'}: Is a directory\n"
    monkeypatch.setenv("MEGATRON_HYDRA_TRACEBACK", "1")
    with pytest.raises(OSError, match="too long"):
        ended(long.stat, capsys)


def test_unexpected_errors_keep_their_traceback():
    def fail():
        raise BrokenPipeError(32, "Broken pipe")

    with pytest.raises(BrokenPipeError):
        command(fail)()
    with pytest.raises(KeyError):
        command(lambda: {}["a"])()
