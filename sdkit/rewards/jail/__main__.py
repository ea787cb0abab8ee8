"""Runs a program in a jail, one test case after another, for `sandbox.py`.  sdkit imports only `messages` of this folder.

It receives the inputs, never the expected results, and only reports what came out: nothing that a program does to its
own interpreter can make a wrong answer right.  This process only forks: one jail per program, with all imports already
done.  In the jail each case is a process of its own.
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
from program import TESTS_FD, run_case

REQUESTS_FD, ANSWERS_FD = 0, 1
STDERR_BYTES = 16_000


def main():
    """Serves one job with its cases, then the next; ends at the end of the input, or if a jail fails."""
    sys.path.remove(os.path.dirname(__file__))
    with contextlib.suppress(EOFError):
        while True:
            job = receive(REQUESTS_FD)
            pid = os.fork()
            if not pid:
                _serve(job)
                os._exit(0)
            if os.waitpid(pid, 0)[1]:
                return


def _serve(job):
    """Isolates this process, then runs cases until one is None."""
    walls.die_with_parent()
    sys.path += job["paths"]
    try:
        walls.count_threads_of_root()
        threads = walls.THREADS
        if job["namespaces"]:
            walls.enter_namespaces()
            _continue_as_init()
            walls.build_root(job["paths"], job["file_bytes"])
        elif os.getresuid()[0] == os.geteuid():
            threads += walls.count_user_threads()
        walls.forbid_inspection()
    except OSError as error:
        where = f": {error.filename}" if error.filename else ""
        send(ANSWERS_FD, {"failed": f"{error.strerror}{where}"})
        return
    send(ANSWERS_FD, {"failed": None})
    while case := receive(REQUESTS_FD):
        send(ANSWERS_FD, _run(case, job, threads))
        if job["namespaces"]:
            walls.reset_scratch(job["file_bytes"])


def _continue_as_init():
    """Returns only in the first process of the new namespace; this one waits for it, and each ends with the other."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(read)
        os.write(write, b".")
        _, status = os.waitpid(pid, 0)
        os._exit(os.waitstatus_to_exitcode(status) and 1)
    walls.die_with_parent()
    os.close(write)
    if not os.read(read, 1):  # the parent ended before die_with_parent was called
        os._exit(1)
    os.close(read)


def _run(case, job, threads):
    """Runs one case; returns how it ended and what it wrote."""
    stdin, tests = os.memfd_create("stdin"), os.memfd_create("tests")
    _fill(stdin, case["given"] if case["kind"] == "stdin" else "")
    out, err, result, control = (os.pipe() for _ in range(4))
    pid = os.fork()
    if not pid:
        try:
            _set_descriptors((stdin, out[1], err[1], result[1], control[0], tests))
            walls.set_limits(job["memory_bytes"], job["file_bytes"], case["cpu_seconds"], threads)
            forbid(files=not job["namespaces"])
            run_case(case, job["program"])
        finally:
            os._exit(1)
    for descriptor in (stdin, out[1], err[1], result[1], control[0]):
        os.close(descriptor)
    case_process = CaseProcess(pid, {"out": out[0], "err": err[0], "says": result[0]}, control[1], tests)
    try:
        return case_process.wait(case, job["output_bytes"])
    finally:
        case_process.close()


def _fill(file, text):
    """Writes the text to the file; its offset stays at the start."""
    data = memoryview(text.encode(errors="replace"))
    place = 0
    while data[place:]:
        place += os.pwrite(file, data[place:], place)


def _set_descriptors(ends):
    """Makes these the first file descriptors, and closes all others."""
    walls.die_with_parent()
    copies = [os.dup2(end, 64 + place) for place, end in enumerate(ends)]
    for place, end in enumerate(copies):
        os.dup2(end, place)
    os.closerange(TESTS_FD + 1, os.sysconf("SC_OPEN_MAX"))


class CaseProcess:
    """The process of a running case."""

    def __init__(self, pid, pipes, control, tests):
        self.pid, self.pipes, self.control, self.tests = pid, pipes, control, tests
        self.output = {name: bytearray() for name in pipes}

    def wait(self, case, max_bytes):
        """Returns how it ended: by itself, by a signal, or killed for exceeding the time or output limit."""
        waiting = case["kind"] == "asserts"
        ended = None
        for reason in self._poll(time.monotonic() + case["seconds"], max_bytes):
            ended = reason
            if waiting and self.output["says"]:
                waiting = False
                self._send_tests()
        os.kill(self.pid, signal.SIGKILL)  # no effect if it has ended already
        _, status, used = os.wait4(self.pid, 0)
        if waiting:
            self._send_tests()  # nobody reads them, but they must not be read as the next case
        code = os.waitstatus_to_exitcode(status)
        written = {name: bytes(text).decode(errors="replace") for name, text in self.output.items()}
        ended = ended or ("signal" if code < 0 else "exit")
        return {"ended": ended, "code": code, "cpu": used.ru_utime + used.ru_stime} | written

    def _poll(self, deadline, max_bytes):
        """Yields None after every read, and the reason if a limit is exceeded; stops when the process has ended."""
        names = {pipe: name for name, pipe in self.pipes.items()}
        reader = select.poll()
        for pipe in names:
            reader.register(pipe, select.POLLIN)
        while names or not os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            left = deadline - time.monotonic()
            if left <= 0:
                yield "time"
                return
            # Once it has closed its pipes, wait only for its end.
            for pipe, _ in reader.poll(1000 * (left if names else min(left, 0.01))):
                if not self._read(names[pipe], pipe):
                    reader.unregister(pipe)
                    del names[pipe]
            if len(self.output["out"]) + len(self.output["says"]) > max_bytes:
                yield "output"
                return
            yield None

    def _read(self, name, pipe):
        """Reads what is available; only the end of standard error is kept."""
        part = os.read(pipe, 1 << 16)
        self.output[name] += part
        if name == "err":
            del self.output[name][:-STDERR_BYTES]
        return part

    def _send_tests(self):
        """Receives and passes on the tests only now, so that the running program has no copy of them."""
        _fill(self.tests, receive(REQUESTS_FD))
        password = receive(REQUESTS_FD).encode()
        with contextlib.suppress(BrokenPipeError):
            os.write(self.control, b"." + password)

    def close(self):
        for pipe in (*self.pipes.values(), self.control, self.tests):
            os.close(pipe)


main()
