"""What a run says: lines for people, the same lines in run.log, and one line that shows how far long work is."""

from __future__ import annotations

import contextlib
import sys
import time


def duration(seconds: float) -> str:
    """Seconds as a person reads them: 42s, 3m05s, 2h07m."""
    seconds = int(round(seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m{seconds % 60:02d}s"
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"


class Log:
    """Prints to ``stream`` and, once :meth:`open` has named one, into a file as well.

    On a terminal, progress is one line that is drawn over itself; elsewhere it is a plain line at most every
    ``interval`` seconds, so that a log file stays short.
    """

    def __init__(self, stream=None, interval: float = 20.0):
        self.stream = stream or sys.stdout
        self.file, self.early = None, []
        self.interval = interval
        self.live = self.stream.isatty()
        self.what, self.started, self.shown, self.first, self.width = None, 0.0, 0.0, 0, 0
        self.notes: list[str] = []

    def open(self, path, append: bool = False) -> None:
        """From now on write to ``path`` too, beginning with everything that was said before; ``append``: behind what is
        there."""
        self.file = open(path, "a" if append else "w", encoding="utf-8")
        early, self.early = self.early, []
        self._write("".join(early))

    def info(self, text: str) -> None:
        """One line to the stream and the file."""
        self._wipe()
        print(text, file=self.stream, flush=True)
        line = time.strftime("%H:%M:%S ") + text + "\n"
        if self.file:
            self._write(line)
        else:
            self.early.append(line)

    def _write(self, text):
        try:
            self.file.write(text)
            self.file.flush()
        except OSError as error:  # a full disk: what matters more will say so, or has found room
            print(f"note: nothing more goes into {self.file.name}: {error.strerror}", file=self.stream, flush=True)
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None

    def note(self, text: str) -> None:
        """Something was skipped, clipped or substituted: a line here, and kept for result.json."""
        self.notes.append(text)
        self.info(f"note: {text}")

    def progress(self, what: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps of ``what`` are finished; shows how long the rest will take."""
        now = time.monotonic()
        if what != self.what or done == 0:
            self.what, self.started, self.shown, self.first = what, now, now, done
        if done >= total:
            self._wipe()
            self.what = None
            return
        if now - self.shown < (0.2 if self.live else self.interval):
            return
        self.shown = now
        timed = done - self.first  # steps before the first call were not timed
        left = f", {duration((now - self.started) / timed * (total - done))} left" if timed > 0 else ""
        line = f"  {what}: {done}/{total} ({100 * done // max(total, 1)} %){left}"
        if self.live:
            self.stream.write("\r" + line.ljust(self.width))
            self.stream.flush()
            self.width = len(line)
        else:
            print(line, file=self.stream, flush=True)

    def close(self) -> None:
        """Ends the updating line and closes the file."""
        self._wipe()
        if self.file:
            with contextlib.suppress(OSError):
                self.file.close()
            self.file = None

    def _wipe(self):
        if self.live and self.width:
            self.stream.write("\r" + " " * self.width + "\r")
            self.width = 0
