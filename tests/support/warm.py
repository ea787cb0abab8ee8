"""A process that has imported what is slow to import, and runs each command in a fork of itself.

A fork is a real process, with streams, a folder and an environment of its own; it only skips seconds of imports.
"""

import atexit
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import forked


class WarmProcess:
    """Starts with the first command; an interrupted command ends it, and the next one starts another."""

    def __init__(self):
        self.server = None

    def run(self, *command, cwd=None, merged=False, timeout=None, interrupt_after=None):
        """Runs `python COMMAND…`, a script or `-m` a module; `merged`: standard error goes to standard output.

        `interrupt_after`: the command gets SIGINT, as by Ctrl-C, once its standard output has this text.  Raises TimeoutExpired after `timeout` seconds; the command's processes are then killed.
        """
        if self.server is None:
            self.server = subprocess.Popen(
                [sys.executable, __file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=os.environ | {"OMP_NUM_THREADS": "1"},  # other threads would not survive a fork
                text=True,
                start_new_session=True,
            )
        command = [*map(str, command)]
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "stdout")
            err = out if merged else Path(folder, "stderr")
            request = (command, str(cwd or Path.cwd()), dict(os.environ), str(out), str(err), interrupt_after)
            try:
                self.server.stdin.write(json.dumps(request) + "\n")
                self.server.stdin.flush()
                if not select.select([self.server.stdout], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(command, timeout)
                code = int(self.server.stdout.readline())
            except BaseException:
                self.close()
                raise
            return subprocess.CompletedProcess(command, code, out.read_text(), err.read_text())

    def close(self):
        if self.server:
            os.killpg(self.server.pid, signal.SIGKILL)  # its forks too
            self.server.communicate()
            self.server = None


def serve():
    """Answers each line, a request, with the code with which its command ended."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print while they are imported
    forked.warm()
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            end(forked.exit_code(lambda line=line: run_request(*json.loads(line))))
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), file=answers, flush=True)


def end(code):
    """Ends this process as the interpreter does, without freeing each object: they are many, and shared with the server."""
    threading._shutdown()  # waits for threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_request(command, cwd, environment, out, err, interrupt_after):
    """Becomes the process of this command."""
    for path, stream in ((os.devnull, 0), (out, 1), (err, 2)):
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    if interrupt_after:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the suite runs in the background
        threading.Thread(target=interrupt, args=(Path(out), interrupt_after), daemon=True).start()
    if command[0] == "-m":
        sys.argv = command[1:]
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = command
        runpy.run_path(command[0], run_name="__main__")


def interrupt(out, text):
    """Sends SIGINT to this process once `text` is in the file."""
    while text not in out.read_text():
        time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGINT)


if __name__ == "__main__":
    serve()
