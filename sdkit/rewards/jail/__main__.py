"""Runs a program in a jail, case after case, for `rewards_sandbox`.  A folder that is run; of its files only `messages` is imported.

It is told the inputs, never what should come out, and only says what did: what a program does to its own interpreter
cannot make a wrong answer right.  This process only forks, one jail for each program, which has everything imported
already; in the jail each case is a process of its own.
"""

import contextlib
import os
import select
import signal
import sys
import time

import walls
from calls import forbid
from messages import receive, send
from program import READS, run_case

ASKED, ANSWERED = 0, 1
KEPT_OF_ERRORS = 16_000


def main():
    """A job and its cases, then the next job; ends when the input does, or when a jail did not end by itself."""
    sys.path.remove(os.path.dirname(__file__))
    with contextlib.suppress(EOFError):
        while True:
            job = receive(ASKED)
            pid = os.fork()
            if not pid:
                _serve(job)
                os._exit(0)
            if os.waitpid(pid, 0)[1]:
                return


def _serve(job):
    """Shut this process in, then run case after case, up to the one that is None."""
    walls.die_with_parent()
    sys.path += job["paths"]
    try:
        walls.be_counted()
        threads = walls.THREADS
        if job["namespaces"]:
            walls.leave()
            _go_on_as_first_of_the_namespace()
            walls.shut(job["paths"], job["file_bytes"])
        elif os.getresuid()[0] == os.geteuid():
            threads += walls.threads_of_the_user()
        walls.be_private()
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        send(ANSWERED, {"failed": f"{error.strerror}{where}"})
        return
    send(ANSWERED, {"failed": None})
    while case := receive(ASKED):
        send(ANSWERED, _answer(case, job, threads))
        if job["namespaces"]:
            walls.clean(job["file_bytes"])


def _go_on_as_first_of_the_namespace():
    """Return in the first process of the new namespace only; this one waits for it, and each ends with the other."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read)
        os.write(write, b".")
        _, status = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(status) and 1)
    walls.die_with_parent()
    os.close(write)
    if not os.read(read, 1):  # its parent was ended before it could notice
        os._exit(1)
    os.close(read)


def _answer(case, job, threads):
    """What came of one case: how it ended, and what it wrote."""
    given, tests = os.memfd_create("stdin"), os.memfd_create("tests")
    _fill(given, case["given"] if case["kind"] == "stdin" else "")
    out, err, says, hears = (os.pipe() for _ in range(4))
    pid = os.fork()
    if not pid:
        try:
            _become((given, out[1], err[1], says[1], hears[0], tests))
            walls.limit(job["memory_bytes"], job["file_bytes"], case["cpu_seconds"], threads)
            forbid(files=not job["namespaces"])
            run_case(case, job["program"])
        finally:
            os._exit(1)
    for mine in (given, out[1], err[1], says[1], hears[0]):
        os.close(mine)
    watched = Watched(pid, {"out": out[0], "err": err[0], "says": says[0]}, hears[1], tests)
    try:
        return watched.until_it_ends(case, job["output_bytes"])
    finally:
        watched.close()


def _fill(file, text):
    """Write all of it, and leave the file to be read from its start."""
    rest = memoryview(text.encode(errors="replace"))
    place = 0
    while rest[place:]:
        place += os.pwrite(file, rest[place:], place)


def _become(ends):
    """Have these as the first file descriptors, and no others."""
    walls.die_with_parent()
    kept = [os.dup2(end, 64 + place) for place, end in enumerate(ends)]
    for place, end in enumerate(kept):
        os.dup2(end, place)
    os.closerange(READS + 1, os.sysconf("SC_OPEN_MAX"))


class Watched:
    """A case under way."""

    def __init__(self, pid, pipes, hears, tests):
        self.pid, self.pipes, self.hears, self.tests = pid, pipes, hears, tests
        self.found = {name: bytearray() for name in pipes}

    def until_it_ends(self, case, most):
        """How it ended: by itself, by a signal, or by us for the time it took or for what it wrote."""
        waiting = case["kind"] == "asserts"
        ended = None
        for reason in self._moments(time.monotonic() + case["seconds"], most):
            ended = reason
            if waiting and self.found["says"]:
                waiting = False
                self._hand_over_the_tests()
        os.kill(self.pid, signal.SIGKILL)  # it has ended already, or does now
        _, status, used = os.wait4(self.pid, 0)
        if waiting:
            self._hand_over_the_tests()  # to nobody: they are not the next case
        code = os.waitstatus_to_exitcode(status)
        told = {name: bytes(text).decode(errors="replace") for name, text in self.found.items()}
        ended = ended or ("signal" if code < 0 else "exit")
        return {"ended": ended, "code": code, "cpu": used.ru_utime + used.ru_stime} | told

    def _moments(self, end, most):
        """Whenever something was read: None, or at last why the case must end now, if it did not by itself."""
        names = {pipe: name for name, pipe in self.pipes.items()}
        reader = select.poll()
        for pipe in names:
            reader.register(pipe, select.POLLIN)
        while names or not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            left = end - time.monotonic()
            if left <= 0:
                yield "time"
                return
            # Where it closed its pipes, only its end is waited for.
            for pipe, _ in reader.poll(1000 * (left if names else min(left, 0.01))):
                if not self._read(names[pipe], pipe):
                    reader.unregister(pipe)
                    del names[pipe]
            if len(self.found["out"]) + len(self.found["says"]) > most:
                yield "output"
                return
            yield None

    def _read(self, name, pipe):
        """Take what is there; of error texts only the end is kept."""
        part = os.read(pipe, 1 << 16)
        self.found[name] += part
        if name == "err":
            del self.found[name][:-KEPT_OF_ERRORS]
        return part

    def _hand_over_the_tests(self):
        """Only now do they come into this process: a program that runs has no copy of them."""
        _fill(self.tests, receive(ASKED))
        word = receive(ASKED).encode()
        with contextlib.suppress(BrokenPipeError):
            os.write(self.hears, b"." + word)

    def close(self):
        for pipe in (*self.pipes.values(), self.hears, self.tests):
            os.close(pipe)


main()
