"""What the process of one case does: the program, and the tests that share its interpreter.  Part of `__main__`."""

import __future__

import atexit
import io
import json
import linecache
import os
import sys
import threading
import traceback
import types
import typing
import unittest

COMMON = (
    "bisect collections datetime decimal fractions functools heapq itertools math random string"
)
for name in COMMON.split():  # what most programs import, once for all
    __import__(name)

PROGRAM, TESTS = "program.py", "tests.py"
SAYS = 3
"""The file descriptor on which the case says what came of it."""
HEARS = 4
"""The one that tells when the tests are there, and the word that says that they passed."""
READS = 5
"""The one of the tests, empty until the program has been run."""
WORD_BYTES = 32


def run_case(case, program):
    """Run one case to its end, which ends the process."""
    sys.argv = [PROGRAM]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), "utf-8", "replace")
    code = 0
    try:
        if case["kind"] == "stdin":
            code = _exit_code(lambda: _run(program, PROGRAM, _module("__main__")))
            _end_as_interpreters_do()
        else:
            _say(_called(case, program) if case["kind"] == "call" else _asserted(program))
    except SystemExit as left:
        _complain(f"SystemExit: {left.code}\nthe program ended before its tests did")
    except BaseException as error:
        _complain(_trace(error))
        code = 1
    sys.stdout.flush()
    os._exit(code)


def _exit_code(run):
    """0, or what the program left with."""
    try:
        run()
    except SystemExit as left:
        if left.code is None or isinstance(left.code, int):
            return (left.code or 0) & 0xFF
        _complain(str(left.code))
        return 1
    return 0


def _end_as_interpreters_do():
    """Wait for threads, and do what was put off to the end; to take down all modules too would take its time."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()


def _module(name):
    """An empty module in which the program runs."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def _run(source, name, module, flags=0):
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec", flags, dont_inherit=True), module.__dict__)


def _called(case, program):
    """What the function returns, as JSON.  Annotations are not looked at, names of `typing` are there."""
    module = _module("program")
    module.__dict__.update({name: getattr(typing, name) for name in typing.__all__})
    _run(program, PROGRAM, module, __future__.annotations.compiler_flag)
    name = case["function"]
    function = getattr(module, name, None)
    if function is None and hasattr(module, "Solution"):
        function = getattr(module.Solution(), name, None)
    if function is None:
        raise NameError(f"name '{name}' is not defined")
    given = case["given"]
    value = function(**given) if isinstance(given, dict) else function(*given)
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name} returned what JSON cannot say: {error}") from None


def _asserted(program):
    """The word that follows the tests, which is only read once they have passed."""
    module = _module("program")
    sys.modules["__main__"] = module
    _run(program, PROGRAM, module)
    _say(b".")
    os.read(HEARS, 1)
    tests = os.pread(READS, os.fstat(READS).st_size, 0).decode()
    before = dict(module.__dict__)
    unittest.main = lambda *_, **__: None  # the tests are found below
    _run(tests, TESTS, module)
    _run_found({n: v for n, v in module.__dict__.items() if before.get(n) is not v})
    return os.read(HEARS, WORD_BYTES)


def _run_found(defined):
    """Functions test…() and classes of test cases, as the tests defined them."""
    for name, value in defined.items():
        is_test = name.startswith("test") and isinstance(value, types.FunctionType)
        if is_test and not value.__code__.co_argcount:
            value()
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
            for test, text in (*result.failures, *result.errors):
                raise AssertionError(f"{test.id()}\n{text}")


def _say(what):
    with os.fdopen(os.dup(SAYS), "wb") as out:
        out.write(what)


def _trace(error):
    """The traceback, of the lines of program and tests alone."""
    pending = [told := traceback.TracebackException.from_exception(error, limit=-200)]
    while pending:
        here = pending.pop()
        own = [frame for frame in here.stack if frame.filename in (PROGRAM, TESTS)]
        here.stack = traceback.StackSummary.from_list(own[-8:])
        pending += filter(None, (here.__cause__, here.__context__))
    return "".join(told.format())


def _complain(text):
    with os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") as out:
        out.write(text)
