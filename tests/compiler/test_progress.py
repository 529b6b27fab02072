"""Stages of long work: what is shown, what is timed."""

import io

import pytest

from lowra.compiler.progress import record_stages, show_progress, stage


def test_progress_off_a_terminal_prints_nothing(capfd):
    with show_progress(), stage("work", 3) as progress:
        progress.advance()
        progress.advance(2)
    assert capfd.readouterr() == ("", "")


def test_progress_on_a_terminal_names_the_stage(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with show_progress(), stage("outer work", 2) as outer:
        with stage("inner work", None) as inner:
            inner.advance()
        outer.advance(2)
    assert "outer work" in screen.getvalue()
    assert "2/2" in screen.getvalue()


def test_stages_are_timed_and_summed_also_when_they_fail():
    with record_stages() as outer, record_stages() as inner:
        with stage("a", 1):
            pass
        once = inner["a"]
        with pytest.raises(ValueError), stage("a", 1):
            raise ValueError
    assert inner["a"] > once >= 0
    assert outer.keys() == inner.keys() == {"a"}
    with stage("b", 1):
        pass
    assert "b" not in outer
