"""Log: lines on a fake clock, on a terminal, in a pipe and in run.log."""

import io

import pytest

from support import log as log_module
from support.log import Log, duration


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (42.4, "42s"), (59.6, "1m00s"), (185, "3m05s"), (3599.4, "59m59s"), (3599.6, "1h00m"), (7679, "2h07m"),
    (90_061, "25h01m")])
def test_duration_as_a_person_reads_it(seconds, text):
    assert duration(seconds) == text


class Clock:
    """Stands in for the time module: monotonic() is `now`, every time of day is 12:34:56."""
    now = 1000.0

    def monotonic(self):
        return self.now

    def strftime(self, form):
        return form.replace("%H:%M:%S", "12:34:56")


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    monkeypatch.setattr(log_module, "time", Clock())
    return log_module.time


def said(clock, stream, calls):
    """What a log writes; ``calls``: (what, done, seconds that pass after it) of ten steps each."""
    log = Log(stream)
    for what, done, pause in calls:
        log.progress(what, done, 10)
        clock.now += pause
    return log.stream.getvalue()


def test_lines_go_to_the_stream_and_the_file_from_the_first_on(clock, tmp_path):
    (tmp_path / "run.log").write_text("of an earlier run\n")
    for append in (False, True):
        log = Log(io.StringIO())
        log.info("early")
        log.open(tmp_path / "run.log", append)
        log.note("late ± ρ")
        assert (tmp_path / "run.log").read_text(encoding="utf-8") == (
            "12:34:56 early\n12:34:56 note: late ± ρ\n" * (2 if append else 1))  # complete before close
        log.close()
        assert log.stream.getvalue() == "early\nnote: late ± ρ\n" and log.notes == ["late ± ρ"]
        log.close()  # a second time does no harm


def test_a_full_disk_is_said_once_and_does_not_stop_the_run(clock):
    log = Log(io.StringIO())
    log.open("/dev/full")
    log.info("one")
    log.info("two")
    assert log.stream.getvalue() == "one\nnote: nothing more goes into /dev/full: No space left on device\ntwo\n"
    log = Log(open("/dev/full", "w"))
    log.info("one")
    assert log.notes == ["nothing more is shown: No space left on device"]


@pytest.mark.parametrize("calls, lines", [
    ([("training", step, 5) for step in range(11)], ["4/10 (40 %), 30s", "8/10 (80 %), 10s"]),
    ([(work, step, 1.5) for work in ("one", "two", "one", "one") for step in range(11)], []),  # short work
    ([("reading", 0, 1000), ("training", 0, 30), ("training", 3, 0)], ["3/10 (30 %), 1m10s"]),
    # the same work again: otherwise the second epoch of that name would count the pause as its own
    ([("training", 0, 0), ("training", 1, 1000), ("training", 0, 30), ("training", 5, 0)], ["5/10 (50 %), 30s"]),
    ([("training", 0, 0), ("training", 10, 1000), ("training", 1, 30), ("training", 4, 0)], ["4/10 (40 %), 1m00s"])])
def test_a_pipe_has_a_line_every_twenty_seconds_and_each_work_its_clock(clock, calls, lines):
    assert said(clock, io.StringIO(), calls) == "".join(f"  training: {line} left\n" for line in lines)


def test_a_terminal_has_one_line_that_is_drawn_over_itself_and_wiped(clock):
    over = "\r\033[K"
    steps = [("training", 0, 10), ("training", 5, 0.1), ("training", 6, 4.9), ("training", 9, 0), ("training", 10, 0)]
    assert said(clock, Terminal(), steps) == (  # not at every step
        f"{over}  training: 5/10 (50 %), 10s left{over}  training: 9/10 (90 %), 2s left{over}")
    log = Log(Terminal())
    log.info("a message")
    log.close()
    assert log.stream.getvalue() == f"{over}a message\n{over}"
