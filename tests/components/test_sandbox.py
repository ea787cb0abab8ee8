"""What hostile programs can and cannot do: real processes, each bounded in time.

Under "all" the walls are namespaces; under "limits only" there are none, and what they would keep out is not tested.
Where this machine refuses a sandbox its tests are skipped with the reason.
"""

import os
import secrets
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdkit.components import rewards_sandbox
from sdkit.components.rewards_sandbox import Limits, Refused, refusal, run

pytestmark = pytest.mark.timeout(120)
QUICK = Limits(seconds=2, memory_mib=256)
PATIENT = Limits(seconds=20, memory_mib=256)


@pytest.fixture(params=["all", "limits only"])
def walls(request, monkeypatch):
    """Both kinds of sandbox.  Without walls root's programs run as nobody, who must reach an interpreter."""
    plain = Path("/usr/bin/python3")
    if request.param == "limits only" and refusal("limits only") and plain.exists():
        monkeypatch.setattr(rewards_sandbox, "PYTHON", os.path.realpath(plain))
        refusal.cache_clear()
    if reason := refusal(request.param):
        pytest.skip(f"no sandbox of this kind here: {reason}")
    yield request.param
    refusal.cache_clear()


@pytest.fixture
def isolated():
    if reason := refusal("all"):
        pytest.skip(f"no namespaces here: {reason}")
    return "all"


def processes_with(word):
    """Ids of the processes whose command line has the word."""
    found = []
    for entry in filter(str.isdigit, os.listdir("/proc")):
        try:
            if word.encode() in Path("/proc", entry, "cmdline").read_bytes():
                found.append(int(entry))
        except OSError:
            continue
    return found


def gone(word, within=5.0):
    until = time.monotonic() + within
    while processes_with(word) and time.monotonic() < until:
        time.sleep(0.05)
    return not processes_with(word)


# ── programs that behave ──────────────────────────────────────────────────────────────────────


def test_input_output_and_exit_code(walls):
    program = "import sys\nprint(input()[::-1], end='')\nprint('é', file=sys.stderr)\nsys.exit(3)"
    done = run(program, PATIENT, walls, stdin="añb\n")
    assert (done.stdout, done.stderr) == ("bña", "é\n")
    assert (done.exit_code, done.stopped, done.late) == (3, None, False)


def test_a_program_may_report_and_write_files(walls):
    program = "import os\nopen('x', 'w').write('kept')\nos.write(3, open('x').read().encode())"
    done = run(program, PATIENT, walls)
    assert (done.report, done.exit_code, done.stderr) == (b"kept", 0, "")


def test_a_crash_is_named(walls):
    done = run("import os\nos.abort()", PATIENT, walls)
    assert done.stopped == "it was ended by signal 6 (SIGABRT)"
    assert done.exit_code is None


def test_the_environment_is_empty_and_nothing_is_installed(walls, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    program = (
        "import os, sys\nprint(sorted(os.environ), [p for p in sys.path if 'site-packages' in p])"
    )
    done = run(program, PATIENT, walls)
    assert done.stdout == "['LC_CTYPE', 'PYTHONHASHSEED'] []\n"  # both are Python's own
    assert run("import attrs", PATIENT, walls).exit_code == 1


def test_only_its_own_files_are_open(walls):
    program = """
import os
found = []
for number in range(256):
    try: os.fstat(number); found.append(number)
    except OSError: pass
print(found)
"""
    assert run(program, PATIENT, walls).stdout == "[0, 1, 2, 3]\n"


def test_sets_have_the_same_order_every_time(walls):
    outputs = {run("print({'a', 'b', 'c', 'd'})", PATIENT, walls).stdout for _ in range(3)}
    assert len(outputs) == 1


# ── programs that do not ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "program",
    ["import time; time.sleep(1000)", "while True: pass"],
    ids=["sleep", "loop"],
)
def test_an_endless_program_is_late(walls, program):
    started = time.monotonic()
    done = run(program, QUICK, walls)
    assert done.late
    assert done.stopped == "it took more than 2 s"
    assert time.monotonic() - started < 10


def test_signals_do_not_put_the_deadline_off(walls):
    program = """
import os, signal, time
for number in range(1, 65):
    try: signal.signal(number, signal.SIG_IGN)
    except (OSError, ValueError): pass
signal.setitimer(signal.ITIMER_REAL, 0)
time.sleep(1000)
"""
    started = time.monotonic()
    assert run(program, QUICK, walls).late
    assert time.monotonic() - started < 10


def test_output_without_end_is_cut(walls):
    for stream in ("stdout", "stderr"):
        program = f"import sys\nwhile True: sys.{stream}.write('x' * 1000)"
        done = run(program, PATIENT, walls)
        assert done.stopped == "it printed more than 64 KiB"
        assert len(getattr(done, stream)) == 64 * 1024
    assert run("print('x' * 70000)", PATIENT, walls, output_extra=70001).stopped is None


def test_memory_is_bounded(walls):
    done = run("kept = []\nwhile True: kept.append(bytearray(10**7))", PATIENT, walls)
    assert done.exit_code == 1
    assert done.stderr.endswith("MemoryError\n")


def test_a_fork_bomb_is_bounded(walls):
    mark = secrets.token_hex()
    program = f"""
# {mark}
import os, sys
children = 0
try:
    while True:
        if os.fork() == 0:
            import time
            time.sleep(1000)
        children += 1
except OSError as error:
    print(children, error.strerror)
"""
    count, _, reason = run(program, PATIENT, walls).stdout.partition(" ")
    assert reason == "Resource temporarily unavailable\n"
    assert int(count) <= (
        16 if walls == "all" else 64
    )  # without walls other programs of nobody count
    started = time.monotonic()
    bomb = "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass"
    assert run(bomb, QUICK, walls).late
    assert time.monotonic() - started < 20


def test_large_files_are_refused(walls):
    done = run("with open('x', 'wb') as f:\n    while True: f.write(b'x' * 10**6)", PATIENT, walls)
    assert "OSError: [Errno 27] File too large" in done.stderr


def test_many_files_are_refused(isolated):
    many = "n = 0\nwhile True:\n    open(str(n), 'wb').write(b'x' * 10**6)\n    n += 1"
    assert "No space left on device" in run(many, PATIENT, isolated).stderr
    empty = "n = 0\nwhile True:\n    open(str(n), 'wb').close()\n    n += 1"
    assert "No space left on device" in run(empty, PATIENT, isolated).stderr
    open_ = "kept = []\nwhile True: kept.append(open('x', 'wb'))"
    assert "Too many open files" in run(open_, PATIENT, isolated).stderr


def test_killing_its_parent_gains_nothing(walls):
    program = "import os, time\nos.kill(os.getppid(), 9)\ntime.sleep(0.2)\nos.write(3, b'alive')"
    done = run(program, PATIENT, walls)
    # Either it may not, or the signal is ignored, or the sandbox ends with the keeper.
    assert done.exit_code is not None or done.stopped
    killer = "import os\nfor pid in range(1, 4000000, 1):\n    try: os.kill(pid, 9)\n    except OSError: pass"
    if walls == "all":  # no process of the machine is in sight: this one lives on
        run(killer, QUICK, walls)
        run("import os\nos.kill(-1, 9)", QUICK, walls)


def test_closed_streams_do_not_hold_the_sandbox(walls):
    close = "import os\nfor number in range(256):\n    try: os.close(number)\n    except OSError: pass\n"
    started = time.monotonic()
    done = run(close + "os._exit(4)", PATIENT, walls)
    assert done.exit_code == 4
    assert run(close + "import time; time.sleep(1000)", QUICK, walls).late
    assert time.monotonic() - started < 20


@pytest.mark.parametrize("end", ["print('bye')", "time.sleep(1000)"], ids=["ends", "late"])
def test_no_daemon_outlives_its_program(walls, end):
    mark = secrets.token_hex()
    program = f"""
import os, sys, time
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(1000)", {mark!r}])
    os._exit(0)
time.sleep(0.5)
{end}
"""
    started = time.monotonic()
    done = run(program, QUICK, walls)
    assert done.late == ("sleep" in end)
    assert time.monotonic() - started < 15
    assert gone(mark)


def test_files_of_the_machine_are_out_of_reach(isolated, tmp_path):
    kept = tmp_path / "kept"
    kept.write_text("secret")
    kept.chmod(0o666)
    program = f"""
import os, shutil
print(os.path.exists({str(kept)!r}), os.path.exists({str(Path(__file__))!r}))
print(sorted(os.listdir("/box")), os.listdir("/tmp"))
shutil.rmtree("/usr", ignore_errors=True)
for where in ("/usr/lib/x", "/etc/x", "/x", "/dev/x"):
    try: open(where, "w"); print("written", where)
    except OSError: pass
"""
    done = run(program, PATIENT, isolated)
    lines = done.stdout.splitlines()
    assert lines[:2] == ["False False", "['program.py'] []"]
    assert not [line for line in lines[2:] if "/usr" in line]
    assert kept.read_text() == "secret"
    assert run("print('still here')", PATIENT, isolated).stdout == "still here\n"


def test_there_is_no_network(isolated):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {port}), 2)"
        done = run(program, PATIENT, isolated)
        assert "unreachable" in done.stderr
        assert run(program, PATIENT, "all but network").exit_code == 0
    names = "import socket\nprint([name for _, name in socket.if_nameindex()])"
    assert run(names, PATIENT, isolated).stdout == "['lo']\n"


def test_there_are_no_privileges(isolated):
    program = """
import ctypes, os
call = ctypes.CDLL(None, use_errno=True)
status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
print(os.getuid(), status["CapEff"].strip(), status["CapPrm"].strip(), status["NoNewPrivs"].strip())
print(call.unshare(0x10000000), call.mount(b"tmpfs", b"/box", b"tmpfs", 0, None))
print(call.ptrace(16, 1, 0, 0), call.shmget(0, ctypes.c_size_t(10**9), 0o1600))
try: print(os.listdir("/proc/1/fd"))
except OSError as error: print(error.strerror)
"""
    assert run(program, PATIENT, isolated).stdout.splitlines() == [
        "65534 0000000000000000 0000000000000000 1",
        "-1 -1",
        "-1 -1",
        "Permission denied",
    ]


# ── the sandbox itself ────────────────────────────────────────────────────────────────────────


def test_nothing_is_left_behind(walls, monkeypatch, tmp_path):
    monkeypatch.setattr(rewards_sandbox.tempfile, "tempdir", str(tmp_path))
    before = set(os.listdir("/proc/self/fd"))
    if walls == "limits only":
        tmp_path.chmod(0o755)
        if os.geteuid() == 0:
            pytest.skip("nobody cannot reach pytest's folders")
    for program in ("print(1)", "open('deep', 'w')", "while True: print('x' * 10000)"):
        run(program, PATIENT, walls)
    assert list(tmp_path.iterdir()) == []
    assert set(os.listdir("/proc/self/fd")) == before
    assert gone("rewards_jail")


def test_the_sandbox_dies_with_the_trainer(isolated):
    mark = secrets.token_hex()
    program = f"import os, sys; os.execv(sys.executable, [sys.executable, '-c', 'import time; time.sleep(1000)', {mark!r}])"
    code = (
        "from sdkit.components.rewards_sandbox import *\n"
        f"run({program!r}, Limits(seconds=100, memory_mib=256), 'all')"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code])
    until = time.monotonic() + 40
    while not any(mark in _last_argument(p) for p in processes_with(mark)):
        assert time.monotonic() < until
        time.sleep(0.05)
    trainer.send_signal(signal.SIGKILL)
    trainer.wait()
    assert gone("time.sleep(1000)\0" + mark)


def _last_argument(process):
    try:
        return Path(f"/proc/{process}/cmdline").read_bytes().decode().split("\0")[-2]
    except (OSError, IndexError):
        return ""


def test_many_at_once(walls):
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        done = list(pool.map(lambda i: run(f"print({i})", PATIENT, walls), range(16)))
    assert [d.stdout for d in done] == [f"{i}\n" for i in range(16)]


def test_a_machine_without_namespaces_refuses(monkeypatch, tmp_path):
    """The jail, but with its call for namespaces failing as it does in most containers."""
    text = rewards_sandbox.JAIL.read_text()
    call = '        call("unshare",'
    assert text.count(call) == 1
    jail = tmp_path / "jail.py"
    jail.write_text(
        text.replace(call, '        raise OSError(1, "unshare: not permitted")\n' + call)
    )
    monkeypatch.setattr(rewards_sandbox, "JAIL", jail)
    with pytest.raises(Refused, match="unshare: not permitted"):
        run("print(1)", PATIENT, "all")
