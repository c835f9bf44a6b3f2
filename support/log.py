"""What a run says: lines for people, the same lines in run.log, and one line that shows how far long work is."""

from __future__ import annotations

import os
import sys
import time


def duration(seconds: float) -> str:
    """Return seconds as a person reads them: 42s, 3m05s, 2h07m."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{seconds:02d}s" if minutes else f"{seconds}s"


class Log:
    """Prints to ``stream`` and, once :meth:`open` has named one, into a file as well. On a terminal, progress is one
    line that is drawn over itself; elsewhere it is a plain line at most every 20 seconds, so that a log file stays
    short."""

    def __init__(self, stream=None):
        self.stream, self.file, self.unwritten = stream or sys.stdout, None, []
        self.live = self.stream.isatty()
        self.interval = 0.2 if self.live else 20.0  # seconds
        self.what, self.started, self.shown, self.first = None, 0.0, 0.0, 0
        self.notes: list[str] = []

    def open(self, path, append: bool = False) -> None:
        """Write to ``path`` too from now on, beginning with what was said before; ``append``: after what it holds."""
        self.file = open(path, "ab" if append else "wb", buffering=0)
        self._write()

    def info(self, text: str) -> None:
        """Say one line, to the stream and the file."""
        self._say(text)
        self.unwritten.append(time.strftime("%H:%M:%S ") + text + "\n")
        self._write()

    def note(self, text: str) -> None:
        """Say that something was skipped, clipped or substituted; notes are kept for result.json."""
        self.notes.append(text)
        self.info(f"note: {text}")

    def progress(self, what: str, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` steps of ``what`` are finished, and how long the rest will take."""
        now = time.monotonic()
        if what != self.what or done <= self.first:  # steps before the first call were not timed
            self.what, self.started, self.shown, self.first = what, now, now, done
        if done >= total:
            self.what = None
            self._say("", end="")
        elif done > self.first and now - self.shown >= self.interval:
            self.shown = now
            rest = duration((now - self.started) / (done - self.first) * (total - done))
            self._say(f"  {what}: {done}/{total} ({100 * done // total} %), {rest} left", end="" if self.live else "\n")

    def close(self) -> None:
        """End the updating line and close the file."""
        self._say("", end="")
        if self.file:
            self.file.close()
            self.file = None

    def _say(self, text, end="\n"):
        try:
            print(("\r\033[K" if self.live else "") + text, end=end, file=self.stream, flush=True)  # over what is there
        except OSError as error:  # its reader has gone, or a disk is full: the work goes on, and what is left unsaid
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            self.note(f"nothing more is shown: {error.strerror}")

    def _write(self):
        try:
            if self.file and self.unwritten:
                self.file.write("".join(self.unwritten).encode())
                self.unwritten.clear()
        except OSError as error:  # a full disk: what matters more will say so
            self._say(f"note: nothing more goes into {self.file.name}: {error.strerror}")
            self.close()
