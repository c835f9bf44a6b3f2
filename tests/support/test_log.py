"""Log: lines on a fake clock, on a terminal, in a pipe and in run.log."""

import io

import pytest

from support import log as log_module
from support.log import Log, duration


@pytest.mark.parametrize("seconds, text", [
    (0, "0s"), (42, "42s"), (42.4, "42s"), (59.4, "59s"), (59.6, "1m00s"), (60, "1m00s"), (185, "3m05s"),
    (3599.4, "59m59s"), (3599.6, "1h00m"), (3600, "1h00m"), (7620, "2h07m"), (7679, "2h07m"), (90_061, "25h01m")])
def test_duration_as_a_person_reads_it(seconds, text):
    assert duration(seconds) == text


class Clock:
    """Stands in for the time module: monotonic() is `now`, every time of day is 12:34:56."""

    def __init__(self):
        self.now = 1000.0

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


def screen(text):
    """The lines that a terminal shows after `text`: a carriage return goes back to the first column."""
    lines = []
    for line in text.split("\n"):
        row = []
        for piece in line.split("\r"):
            row[:len(piece)] = piece
        lines.append("".join(row).rstrip())
    return lines


@pytest.fixture
def log(clock):
    return Log(io.StringIO(), interval=20.0)


def test_lines_go_to_the_stream_and_notes_are_kept(log, capsys):
    log.info("one")
    log.note("two of three images were skipped")
    assert log.stream.getvalue() == "one\nnote: two of three images were skipped\n"
    assert log.notes == ["two of three images were skipped"] and Log(log.stream).notes == []
    Log().info("hello")
    assert capsys.readouterr().out == "hello\n"


def test_the_file_begins_with_what_was_said_before_it_was_opened_and_replaces_an_older_one(log, tmp_path):
    (tmp_path / "run.log").write_text("of an earlier run\n")
    log.info("early")
    log.note("skipped")
    log.open(tmp_path / "run.log")
    log.info("late ± ρ")
    assert (tmp_path / "run.log").read_text(encoding="utf-8") == (
        "12:34:56 early\n12:34:56 note: skipped\n12:34:56 late ± ρ\n")  # complete before close
    log.close()
    assert log.stream.getvalue() == "early\nnote: skipped\nlate ± ρ\n"
    log.close()  # a second time does no harm


def test_piped_progress_is_a_plain_line_at_most_every_interval(clock, log):
    for step in range(100):  # one step a second
        log.progress("training", step, 100)
        clock.now += 1
    log.progress("training", 100, 100)
    assert log.stream.getvalue().splitlines() == [
        "  training: 20/100 (20 %), 1m20s left", "  training: 40/100 (40 %), 1m00s left",
        "  training: 60/100 (60 %), 40s left", "  training: 80/100 (80 %), 20s left"]
    assert "\r" not in log.stream.getvalue()


def test_piped_progress_of_short_work_says_nothing(clock, log):
    for work in ("one", "two", "three", "one"):
        for step in range(16):
            log.progress(work, step, 15)
            clock.now += 1
    log.progress("reading", 0, 0)  # nor work without a total
    assert log.stream.getvalue() == ""


@pytest.mark.parametrize("calls, line", [
    ([("reading", 0, 1000), ("training", 0, 30), ("training", 3, 0)], "3/10 (30 %), 1m10s"),
    # the same work again: otherwise the second epoch of that name would count the pause as its own
    ([("training", 0, 0), ("training", 10, 1000), ("training", 0, 30), ("training", 5, 0)], "5/10 (50 %), 30s"),
    ([("training", 0, 0), ("training", 1, 1000), ("training", 0, 30), ("training", 5, 0)], "5/10 (50 %), 30s"),
    # work that first reports after a step, behind other work, finished or not, or the same
    ([("reading", 0, 0), ("reading", 10, 1000), ("training", 1, 30), ("training", 4, 0)], "4/10 (40 %), 1m00s"),
    ([("training", 0, 0), ("training", 10, 1000), ("training", 1, 30), ("training", 4, 0)], "4/10 (40 %), 1m00s"),
    ([("reading", 0, 1000), ("training", 1, 30), ("training", 4, 0)], "4/10 (40 %), 1m00s"),
    ([("training", 1, 30), ("training", 2, 0)], "2/10 (20 %), 4m00s")])  # from steps that were timed alone
def test_each_work_has_its_clock(clock, log, calls, line):
    for what, done, pause in calls:
        log.progress(what, done, 10)
        clock.now += pause
    assert log.stream.getvalue() == f"  training: {line} left\n"


def test_a_terminal_has_one_line_that_is_drawn_over_itself(clock):
    stream = Terminal()
    log = Log(stream)
    log.progress("reading training images", 0, 100)
    shown = []
    for done in (50, 60, 90):
        clock.now += 10
        log.progress("reading training images", done, 100)
        shown += screen(stream.getvalue())
    assert "\n" not in stream.getvalue() and stream.getvalue().startswith("\r")
    assert [line.partition(": ")[2] for line in shown] == [  # of the old, longer line nothing stays
        "50/100 (50 %), 10s left", "60/100 (60 %), 13s left", "90/100 (90 %), 3s left"]


def test_a_terminal_is_not_redrawn_at_every_step(clock):
    stream = Terminal()
    log = Log(stream)
    for step in range(1000):  # one second in all
        log.progress("training", step, 1000)
        clock.now += 0.001
    assert 3 <= stream.getvalue().count("\r") <= 6


@pytest.mark.parametrize("end, left", [
    (lambda log: log.progress("training", 10, 10), [""]), (lambda log: log.close(), [""]),
    (lambda log: log.info("epoch 1"), ["epoch 1", ""])], ids=["finished", "closed", "message"])
def test_the_line_on_a_terminal_is_wiped_at_the_end_and_before_a_message(clock, end, left):
    stream = Terminal()
    log = Log(stream)
    log.progress("training", 0, 10)
    clock.now += 5
    log.progress("training", 5, 10)
    assert screen(stream.getvalue()) == ["  training: 5/10 (50 %), 5s left"]
    end(log)
    assert screen(stream.getvalue()) == left
    before = len(stream.getvalue())
    log.info("epoch 2")
    assert stream.getvalue()[before:] == "epoch 2\n"  # nothing is left to wipe
