"""Programs and their tests: what passes, the feedback for what fails, and what hostile programs cannot do."""

import json
import os
import platform
import signal
import subprocess
import sys
import time

import psutil
import pytest
from os_processes import members, wait_until

from sdkit.language.errors import BadData, BadEnvironment
from sdkit.language.specs import LastCodeBlock, PythonTests, Tagged, WholeText
from sdkit.rewards import sandbox as rewards_sandbox
from sdkit.rewards.answers import extract
from sdkit.rewards.program_tests import Test as Case
from sdkit.rewards.program_tests import read_tests
from sdkit.rewards.sandbox import JAIL, Sandbox
from sdkit.rewards.scoring import open_reward, open_rewards, score

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() not in rewards_sandbox.MACHINES,
    reason="programs are tested on Linux only",
)
MODES = ("namespaces", "without_namespaces")
LIMITS = {"extract": WholeText(), "seconds": 20.0, "cpu_seconds": 1, "memory_mib": 256}


@pytest.fixture(scope="module")
def sandboxes():
    """Opens one sandbox per mode, on first use."""
    open_with = {}

    def get(mode):
        if mode not in open_with:
            try:
                open_with[mode] = Sandbox(PythonTests(**LIMITS, files_mib=8, isolation=mode))
            except BadEnvironment as error:
                if mode == "namespaces":
                    pytest.skip(f"no user namespaces here: {error.message}")
                raise
        return open_with[mode]

    return get


@pytest.fixture(params=MODES)
def sandbox(request, sandboxes):
    return sandboxes(request.param)


@pytest.fixture(scope="module")
def reward(sandboxes):
    """Opens the reward with these fields, in the mode that this machine allows."""

    def open_with(**fields):
        try:
            sandboxes("namespaces")
            mode = "namespaces"
        except pytest.skip.Exception:
            mode = "without_namespaces"
        return open_reward(PythonTests(**(LIMITS | {"isolation": mode} | fields)), None, None)

    return open_with


@pytest.fixture(scope="module")
def judge(reward):
    return reward()


def run(sandbox, program, given="", seconds=20.0):
    """Result of a program on standard input; checks that no process remains."""
    with sandbox.open_jail(program, 2 * seconds) as jail:
        result = jail.run_test(Case(kind="stdin", input=given, expected=""), seconds)
    with sandbox._workers.worker() as process:
        assert process is jail.process
        wait_until(lambda: not psutil.Process(process.pid).children())
    return result


def cases(*pairs, **more):
    inputs, outputs = zip(*pairs, strict=True)
    return json.dumps({"inputs": inputs, "outputs": outputs, "fn_name": ""} | more)


ADDS = "print(sum(map(int, input().split())))"


@pytest.mark.parametrize(
    ("text", "program"),
    [
        ("First\n```\nold\n```\nthen\n```python\nnew\n```\nDone.", "new\n"),
        ("```py\na\n\nb\n```", "a\n\nb\n"),
        ("- so:\n  ```python\n  if a:\n    b\n  ```", "if a:\n  b\n"),
        ("````\n```\nx\n```\n````", "```\nx\n```\n"),
        ("```python\nnever closed", None),
        ("```python\na\n```\n```python\nnever closed", "a\n"),
        ("`x = 1`", None),
    ],
)
def test_last_code_block_is_extracted(text, program):
    assert extract(LastCodeBlock(), text) == program


def test_every_form_of_tests_is_read(make_row):
    def read(value):
        return read_tests(make_row(tests=value), "tests")

    one = Case(kind="stdin", input="1 2", expected="3", cpu_seconds=2)
    table = {"inputs": ["1 2"], "outputs": ["3"], "testtype": "stdin", "time_limit": 2}
    assert read(table) == read(json.dumps(table)) == [one]
    call = Case(kind="call", input=[[1, 2], 3], expected=None, function="f")
    lines = {"input": "[1, 2]\n3", "output": "null", "testtype": "functional", "fn_name": "f"}
    assert read([lines]) == read(json.dumps([lines])) == [call]
    assert read([{"input": [[1, 2], 3], "output": None, "fn_name": "f"}]) == [call]
    asserts = [Case(kind="asserts", input=text) for text in ("assert f(1)", "assert f(2)")]
    assert read(["assert f(1)", "assert f(2)"]) == asserts
    assert read("assert f(1)") == asserts[:1]
    assert read("[1]\nassert f(1)") == [Case(kind="asserts", input="[1]\nassert f(1)")]
    coded = {"inputs": ["assert f(1)"], "outputs": [""], "testtype": "code"}
    assert [t.kind for t in read(coded)] == ["asserts"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "there are none"),
        ([], "there are none"),
        (7, "7 is neither text, list nor table"),
        ([7], "'7' is neither source nor a table with input and output"),
        ({"inputs": ["1"]}, "a table needs the lists inputs and outputs"),
        ({"inputs": ["1"], "outputs": []}, "there are 1 inputs, but 0 outputs"),
        ([{"input": "1", "output": 2}], "the input and output of stdin tests must be text"),
        ([{"input": "1", "output": "1", "type": "x"}], "testtype 'x' is not one of 'stdin'"),
        ([{"input": "a", "output": "1", "fn_name": "f"}], "'a' is not JSON"),
        ([{"input": "1", "output": "1", "type": "functional"}], "tests of a function need its name as fn_name"),
        ([{"input": "1", "output": "1", "time_limit": 0}], "time_limit 0 is no number above 0"),
    ],
)
def test_unreadable_tests_are_refused(make_row, judge, value, message):
    with pytest.raises(BadData, match=f"row 5: tests in the column 'tests': {message}"):
        judge.check_row(make_row(index=5, tests=value))


@pytest.mark.parametrize(
    ("printed", "expected", "passes"),
    [
        (" 1 \n2\n", "1\n2", True),
        ("1.0 2", "1 2.00", True),
        ("1", "1\n2", False),
        ("1 2", "1 3", False),
        ("yes", "Yes", False),
        ("nan", "nan", True),
    ],
)
def test_printed_lines_are_compared(printed, expected, passes):
    assert Case(kind="stdin", input="", expected=expected).passed(printed) is passes


@pytest.mark.parametrize(
    "program", [ADDS, "import sys\nprint(sum(int(x) for x in sys.stdin.read().split()))\nsys.exit()"]
)
def test_program_that_reads_and_prints_passes(judge, make_row, program):
    judged = judge(program, make_row(tests=cases(("1 2\n", "3\n"), ("4 5\n", "9"))))
    assert (judged.reward, judged.feedback) == (1.0, None)


def test_feedback_on_a_wrong_output(judge, make_row):
    judged = judge("print(3 if input() == '1 2' else 8)", make_row(tests=cases(("1 2", "3"), ("4 5", "9"))))
    assert judged.reward == 0
    assert judged.feedback == ("Test 2 of 2 failed.\n\nInput:\n4 5\n\nOutput:\n8\n\nExpected:\n9")


def test_feedback_on_an_error(judge, make_row):
    judged = judge("def half(x):\n    return x / 0\n\nhalf(1)", make_row(tests=cases(("", "3"))))
    assert judged.reward == 0
    assert judged.feedback.startswith("Test 1 of 1 failed.\n\nInput:\n(nothing)\n\nTraceback (most")
    assert 'File "program.py", line 2, in half\n    return x / 0\n' in judged.feedback
    assert judged.feedback.endswith("ZeroDivisionError: division by zero\n\nExpected:\n3")
    assert "rewards/jail" not in judged.feedback


def test_functions_and_methods_are_tested(judge, make_row):
    tests = [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "fn_name": "put"}]
    row = make_row(tests=tests)
    plain = "def put(a: List[int], b: int):\n    return (*a, b)"
    method = "class Solution:\n    def put(self, a: List[int], b: int):\n        return a + [b]"
    assert [judge(text, row).reward for text in (plain, method)] == [1, 1]
    named = [{"input": {"a": 1, "b": 2}, "output": 3, "fn_name": "f"}]
    assert judge("def f(b, a):\n    return b + a", make_row(tests=named)).reward == 1
    wrong = judge("def put(a, b):\n    return a", row)
    assert wrong.feedback == (
        "Test 1 of 1 failed.\n\nInput:\nput([1, 2], 3)\n\nOutput:\n[1, 2]\n\nExpected:\n[1, 2, 3]"
    )
    for program, message in (
        ("x = 1", "NameError: name 'put' is not defined"),
        ("def put(a, b):\n    return {1}", "put returned what JSON cannot say: Object of type set"),
        ("def put(a, b):\n    raise KeyError(b)", "KeyError: 3"),
    ):
        judged = judge(program, row)
        assert judged.reward == 0
        assert message in judged.feedback


CLASS = """
import unittest
class TestDouble(unittest.TestCase):
    def test_two(self):
        self.assertEqual(double(2), 4)
if __name__ == "__main__":
    unittest.main()
"""


@pytest.mark.parametrize(
    ("tests", "message"),
    [
        ("assert double(1) == 2\nassert double(2) == 4, 'two'", "AssertionError: two"),
        ("def test_two():\n    assert double(2) == 4", 'File "tests.py", line 2, in test_two'),
        (CLASS, "AssertionError: 3 != 4"),
        (CLASS + "unittest.main()", "AssertionError: 3 != 4"),
        ("def check(f):\n    assert f(2) == 4\ncheck(double)", "assert f(2) == 4"),
    ],
)
def test_asserts_are_tested(judge, make_row, tests, message):
    row = make_row(tests=tests)
    assert judge("def double(x):\n    return 2 * x", row).reward == 1
    wrong = judge("def double(x):\n    return x + 1", row)
    assert wrong.reward == 0
    assert message in wrong.feedback


def test_credit_is_all_or_a_share(reward, make_row):
    row = make_row(tests=["assert x == 1", "assert x == 2", "assert x > 0", "assert x < 3"])
    assert reward()("x = 1", row).reward == 0
    share = reward(credit="share")("x = 1", row)
    assert share.reward == 0.75
    assert share.feedback.startswith("Test 2 of 4 failed.")
    assert reward(credit="share")("x = 1", make_row(tests=["assert x == 1"] * 2)).reward == 1


def test_answer_without_a_program_gets_feedback(reward, make_row):
    row = make_row(tests="assert True")
    judged = reward(extract=LastCodeBlock())("no code", row)
    assert judged.reward == 0
    assert judged.feedback.startswith("There is no program: the answer has no complete code block")
    judged = reward(extract=Tagged())("no code", row)
    assert judged.feedback == "There is no program in the answer."


def test_feedback_is_cut_to_its_limit(reward, make_row):
    judged = reward(feedback_characters=40)("raise ValueError('x' * 9999)", make_row(tests="1"))
    assert len(judged.feedback) == 40


def test_packages_are_importable_only_if_requested(reward, make_row):
    row = make_row(tests="assert attrs")
    assert "No module named 'attrs'" in reward()("import attrs", row).feedback
    assert reward(packages=True)("import attrs", row).reward == 1


def test_environment_is_not_passed_on(judge, make_row, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "s3cret")
    monkeypatch.setenv("LD_PRELOAD", "")
    program = "import os\nprint(*sorted(set(os.environ) & {'SECRET_TOKEN', 'LD_PRELOAD'}))"
    assert judge(program, make_row(tests=cases(("", "")))).reward == 1


@pytest.mark.parametrize(
    "program",
    [
        "while True: pass",
        "import signal\nfor s in (1, 2, 13, 14, 15, 24): signal.signal(s, signal.SIG_IGN)\nwhile True: pass",
        "import os\nos.closerange(0, 99)\nwhile True: pass",
        "import os, threading\nos._exit = print\nthreading.Thread(target=sum, args=(iter(int, 1),)).start()",
    ],
)
def test_endless_program_is_stopped(sandbox, program):
    result = run(sandbox, program)
    assert result.failure == "It took more than 1 s of processor time."


def test_sleeping_program_is_stopped(sandbox):
    started = time.monotonic()
    result = run(sandbox, "import time\ntime.sleep(600)", seconds=0.4)
    assert result.failure.startswith("All tests together took more than")
    assert time.monotonic() - started < 10


@pytest.mark.parametrize(
    ("program", "error"),
    [
        ("import os\nwhile True: os.fork()", "PermissionError"),
        ("import os\nif os.fork() == 0: os.setsid()", "PermissionError"),
        ("import subprocess\nsubprocess.run(['true'])", "PermissionError"),
        ("import os\nos.execv('/bin/true', ['true'])", "PermissionError"),
        ("import multiprocessing as m\nm.Process(target=print).start()", "PermissionError"),
        ("import ctypes\nassert ctypes.CDLL(None).fork() >= 0", "AssertionError"),
        ("import os\nos.kill(-1, 9)", "PermissionError"),
        ("import os\nos.kill(os.getppid(), 9)", "PermissionError"),
        ("import os\nos.setuid(0)", "PermissionError"),
        ("import socket\nsocket.create_connection(('127.0.0.1', 80))", "PermissionError"),
        ("import resource as r\nr.prlimit(1, r.RLIMIT_CPU, (1, 1))", "PermissionError"),
        ("x = []\nwhile True: x.append(bytearray(1 << 24))", "MemoryError"),
        ("def f(): f()\nf()", "RecursionError"),
        ("import sys\nsys.stdout.close()\nprint(1)", "ValueError"),
    ],
)
def test_forbidden_operation_fails(sandbox, program, error):
    result = run(sandbox, program)
    assert result.failure
    assert error in result.stderr


def test_number_of_threads_is_limited(sandbox):
    program = """
import threading, time
threading.stack_size(65536)
for i in range(500):
    threading.Thread(target=time.sleep, args=(600,), daemon=True).start()
"""
    assert "can't start new thread" in run(sandbox, program).stderr
    few = "import threading\nt = threading.Thread(target=print, args=(1,))\nt.start()"
    assert run(sandbox, few).result == "1\n"


def test_long_output_stops_the_program(sandbox):
    assert run(sandbox, "while True: print('x' * 9999)").failure == "It wrote more than 1024 KiB."
    noisy = run(sandbox, "import sys\nsys.stderr.write('x' * 10**6)\nraise KeyError('last')")
    assert noisy.stderr.endswith("KeyError: 'last'\n")
    assert len(noisy.stderr) == 16_000


def test_crash_is_reported(sandbox):
    assert run(sandbox, "import ctypes\nctypes.string_at(0)").failure == "It was ended by SIGSEGV."


def test_files_outside_cannot_be_written(sandbox, tmp_path):
    (tmp_path / "here").write_text("as it was")
    for program in (
        f"open({str(tmp_path / 'there')!r}, 'w').write('x')",
        f"open({str(tmp_path / 'here')!r}, 'a').write('x')",
        f"import os\nos.truncate({str(tmp_path / 'here')!r}, 0)",
        f"import os\nos.unlink({str(tmp_path / 'here')!r})",
        f"import os\nos.rename({str(tmp_path / 'here')!r}, '/tmp/x')",
        "import os\nopen(os.path.dirname(os.__file__) + '/sdkit-was-here', 'w')",
    ):
        assert "Error" in run(sandbox, program).stderr
    assert [p.name for p in tmp_path.iterdir()] == ["here"]
    assert (tmp_path / "here").read_text() == "as it was"


def test_namespaces_hide_the_users_files(sandboxes, tmp_path):
    sandbox = sandboxes("namespaces")
    (tmp_path / "secret").write_text("s3cret")
    for path in (tmp_path / "secret", "/etc/passwd", f"/proc/{os.getpid()}/environ", "/proc/self"):
        result = run(sandbox, f"open({str(path)!r})")
        assert "FileNotFoundError" in result.stderr
    listing = run(sandbox, "import os\nprint(os.getpid(), os.getcwd(), len(os.listdir('.')))")
    assert listing.result == "2 /sandbox 0\n"
    interfaces = run(sandbox, "import socket\nprint([name for _, name in socket.if_nameindex()])")
    assert "PermissionError" in interfaces.stderr


def test_written_files_are_limited_and_deleted_after_the_test(sandboxes):
    sandbox = sandboxes("namespaces")
    fills = "import itertools\nfor i in itertools.count(): open(f'{i}', 'wb').write(bytes(1 << 20))"
    assert "No space left on device" in run(sandbox, fills).stderr
    assert "File too large" in run(sandbox, "open('x', 'wb').write(bytes(9 << 20))").stderr
    program = "import os\nprint(os.listdir('/tmp'))\nopen('kept', 'w').write('x')"
    with sandbox.open_jail(program, 60.0) as jail:
        case = Case(kind="stdin", input="", expected="")
        assert [jail.run_test(case, 20.0).result for _ in range(2)] == ["[]\n"] * 2


@pytest.mark.parametrize(
    "program",
    [
        "import sys\nsys.exit(0)",
        "import os\nos._exit(0)",
        "import os\ndef f(): os._exit(0)",
        "import sys\ndef f(): sys.exit(0)",
        "import os\nos.write(3, b'.' + b'0' * 32)\nos._exit(0)",
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(): raise SystemExit",
        "print('.' + '0' * 32)\nraise KeyboardInterrupt",
        "def f(): return 1\nimport builtins\nbuiltins.AssertionError = None",
    ],
)
def test_early_exit_passes_no_asserts(judge, make_row, program):
    judged = judge(program, make_row(tests="assert f() == 2"))
    assert judged.reward == 0
    assert judged.feedback


def test_values_are_compared_outside_the_sandbox(judge, make_row):
    tests = [{"input": "1", "output": "2", "fn_name": "f"}]
    equal = "class A(int):\n    def __eq__(self, other): return True\ndef f(x): return A(7)"
    searching = (
        "import gc, sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n"
        "        for value in (*frame.f_locals.values(), *frame.f_globals.values()):\n"
        "            if isinstance(value, dict) and 'expected' in value: return value['expected']\n"
        "        frame = frame.f_back"
    )
    for program in (equal, searching, "import os\ndef f(x):\n    os.write(3, b'7')\n    os._exit(0)"):
        assert judge(program, make_row(tests=tests)).reward == 0


@pytest.mark.parametrize("depth", [900, 960, 990, 100_000])
def test_deeply_nested_values_are_wrong_without_an_error(judge, make_row, depth):
    program = f"import os\ndef f(x):\n    os.write(3, b'[' * {depth} + b']' * {depth})\n    os._exit(0)"
    judged = judge(program, make_row(tests=[{"input": "1", "output": "2", "fn_name": "f"}]))
    assert judged.reward == 0
    assert judged.feedback


def test_source_of_tests_is_sent_after_the_program_ran(judge, make_row):
    program = "import os\nfound = os.fstat(5).st_size"
    assert judge(program, make_row(tests="assert found == 0")).reward == 1


def test_tests_of_a_completion_share_a_time_limit(reward, make_row):
    sleeps, quick = "import time\ntime.sleep(60)", "assert True"
    shared = reward(seconds=20, total_seconds=1, credit="share")
    judged = shared("pass", make_row(tests=[quick, sleeps, quick, quick]))
    assert judged.reward == 0.25
    assert judged.feedback.endswith("All tests together took more than 1 s.")
    alone = reward(seconds=0.5, credit="share")("pass", make_row(tests=[sleeps, quick]))
    assert alone.reward == 0.5
    assert alone.feedback.endswith("It took more than 0.5 s.")


def test_time_limit_of_a_row_overrides(reward, make_row):
    tests = cases(("", "1"), testtype="stdin", time_limit=1)
    judged = reward(cpu_seconds=30)("while True: pass", make_row(tests=tests))
    assert "It took more than 1 s of processor time." in judged.feedback


def test_programs_run_in_parallel(reward, make_row):
    rows = [make_row(index=i, tests=cases(("", str(i)))) for i in range(6)]
    texts = [f"import time\ntime.sleep(0.7)\nprint({i})" for i in range(6)]
    many = {"many": reward(at_once=6)}
    score(many, texts, rows)  # starts the processes
    started = time.monotonic()
    assert [j.reward for j in score(many, texts, rows)["many"]] == [1] * 6
    assert time.monotonic() - started < 6 * 0.7


def test_jail_that_does_not_answer_is_killed(sandboxes, monkeypatch):
    monkeypatch.setattr(rewards_sandbox, "GRACE", 0.0)
    sandbox = sandboxes("without_namespaces")
    with sandbox.open_jail("import time\ntime.sleep(600)", 1.0) as jail:
        process = jail.process
        result = jail.run_test(Case(kind="stdin", input="", expected=""), 300.0)
    assert result.failure == "It was ended with its sandbox."
    wait_until(lambda: not members(process.pid))
    assert run(sandbox, "print(1)").result == "1\n"


def test_process_being_killed_is_not_reused(sandboxes, monkeypatch):
    def kill_slowly(process):
        with process._waitpid_lock:  # held during `wait`, so that `poll` returns None
            os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.5)
        process.wait()

    monkeypatch.setattr(rewards_sandbox, "GRACE", 0.0)
    monkeypatch.setattr(rewards_sandbox, "kill_group", kill_slowly)
    sandbox = sandboxes("without_namespaces")
    with sandbox.open_jail("import time\ntime.sleep(600)", 0.5) as jail:
        jail.run_test(Case(kind="stdin", input="", expected=""), 300.0)
    assert run(sandbox, "print(1)").result == "1\n"


@pytest.mark.parametrize("mode", MODES)
def test_killed_trainer_leaves_no_process(sandboxes, mode):
    sandboxes(mode)
    job = {"program": "import time\ntime.sleep(600)", "namespaces": mode == "namespaces"}
    job |= {"paths": [], "memory_bytes": 1 << 28, "file_bytes": 1 << 20, "output_bytes": 1 << 20}
    case = {"kind": "stdin", "seconds": 1.0, "cpu_seconds": 1, "given": "", "function": ""}
    trainer = f"""
import subprocess, sys, time
sys.path.insert(0, {str(JAIL)!r})
from messages import receive, send
jail = subprocess.Popen([sys.executable, "-S", {str(JAIL)!r}], stdin=-1, stdout=-1, bufsize=0, start_new_session=True)
send(jail.stdin.fileno(), {job!r})
receive(jail.stdout.fileno())
send(jail.stdin.fileno(), {case!r})
print(jail.pid, flush=True)
time.sleep(600)
"""
    with subprocess.Popen([sys.executable, "-S", "-c", trainer], stdout=subprocess.PIPE) as parent:
        group = int(parent.stdout.readline())
        assert members(group)
        parent.kill()
    wait_until(lambda: not members(group), seconds=20)


def test_missing_user_namespaces_are_refused_unless_disabled(sandboxes, tmp_path, monkeypatch):
    sandboxes("namespaces")
    python = tmp_path / "python"
    inside = f'echo 0 > /proc/sys/user/max_user_namespaces; exec {sys.executable} "$@"'
    python.write_text(f"#!/bin/sh\nexec unshare -Ur sh -c '{inside}' sh \"$@\"\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(BadEnvironment, match=r"rewards\.code: .* this machine does not allow: unshare") as caught:
        open_rewards({"code": PythonTests()}, ["code"], None, None)
    assert caught.value.exit_code == 4
    assert caught.value.hint.startswith("isolation: without_namespaces runs them behind limits")
    without = Sandbox(PythonTests(**LIMITS, isolation="without_namespaces"))
    assert run(without, "print(input())", "hello").result == "hello\n"


def test_other_machines_are_refused(monkeypatch):
    monkeypatch.setattr(platform, "machine", lambda: "riscv64")
    with pytest.raises(BadEnvironment, match="need Linux on x86_64 or aarch64: this is linux on riscv"):
        Sandbox(PythonTests())
