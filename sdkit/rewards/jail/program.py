"""The process of one test case: runs the program, and any tests that share its interpreter.  Part of `__main__`."""

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

COMMON = "bisect collections datetime decimal fractions functools heapq itertools math random string"
for name in COMMON.split():  # what most programs import, loaded once before the fork
    __import__(name)

PROGRAM, TESTS = "program.py", "tests.py"
RESULT_FD = 3
"""File descriptor to which the case writes its result."""
CONTROL_FD = 4
"""File descriptor that signals that the tests are there, and then gives the password that reports success."""
TESTS_FD = 5
"""File descriptor of the tests, empty until the program has run."""
PASSWORD_BYTES = 32


def run_case(case, program):
    """Runs one case, then ends the process."""
    sys.argv = [PROGRAM]
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0)), "utf-8", "replace")
    code = 0
    try:
        if case["kind"] == "stdin":
            code = _exit_code(lambda: _run(program, PROGRAM, _new_module("__main__")))
            _finalize()
        else:
            _write_result(_call(case, program) if case["kind"] == "call" else _run_asserts(program))
    except SystemExit as error:
        _write_error(f"SystemExit: {error.code}\nthe program ended before its tests did")
    except BaseException as error:
        _write_error(_format_traceback(error))
        code = 1
    sys.stdout.flush()
    os._exit(code)


def _exit_code(run):
    """Runs the function and returns the exit code: 0, or that of SystemExit."""
    try:
        run()
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        _write_error(str(error.code))
        return 1
    return 0


def _finalize():
    """Waits for threads and runs the exit handlers; tearing down all modules would take too long."""
    for thread in threading.enumerate():
        if thread is not threading.current_thread() and not thread.daemon:
            thread.join()
    atexit._run_exitfuncs()


def _new_module(name):
    """Returns an empty, registered module in which the program runs."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    return module


def _run(source, name, module, flags=0):
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    exec(compile(source, name, "exec", flags, dont_inherit=True), module.__dict__)


def _call(case, program):
    """Calls the function and returns its value as JSON.  Annotations are not evaluated; `typing` names are predefined."""
    module = _new_module("program")
    module.__dict__.update({name: getattr(typing, name) for name in typing.__all__})
    _run(program, PROGRAM, module, __future__.annotations.compiler_flag)
    name = case["function"]
    function = getattr(module, name, None)
    if function is None and hasattr(module, "Solution"):
        function = getattr(module.Solution(), name, None)
    if function is None:
        raise NameError(f"name '{name}' is not defined")
    arguments = case["given"]
    value = function(**arguments) if isinstance(arguments, dict) else function(*arguments)
    try:
        return json.dumps(value).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise TypeError(f"{name} returned what JSON cannot say: {error}") from None


def _run_asserts(program):
    """Runs the tests; returns the password that follows them, which is read only once they have passed."""
    module = _new_module("program")
    sys.modules["__main__"] = module
    _run(program, PROGRAM, module)
    _write_result(b".")
    os.read(CONTROL_FD, 1)
    tests = os.pread(TESTS_FD, os.fstat(TESTS_FD).st_size, 0).decode()
    before = dict(module.__dict__)
    unittest.main = lambda *_, **__: None  # the tests are collected below
    _run(tests, TESTS, module)
    _run_collected({n: v for n, v in module.__dict__.items() if before.get(n) is not v})
    return os.read(CONTROL_FD, PASSWORD_BYTES)


def _run_collected(defined):
    """Runs the test…() functions and TestCase classes that the tests defined."""
    for name, value in defined.items():
        is_test = name.startswith("test") and isinstance(value, types.FunctionType)
        if is_test and not value.__code__.co_argcount:
            value()
        if isinstance(value, type) and issubclass(value, unittest.TestCase):
            result = unittest.TestResult()
            unittest.defaultTestLoader.loadTestsFromTestCase(value).run(result)
            for test, text in (*result.failures, *result.errors):
                raise AssertionError(f"{test.id()}\n{text}")


def _write_result(data):
    with os.fdopen(os.dup(RESULT_FD), "wb") as out:
        out.write(data)


def _format_traceback(error):
    """The traceback, with only the lines of the program and the tests."""
    pending = [summary := traceback.TracebackException.from_exception(error, limit=-200)]
    while pending:
        current = pending.pop()
        own = [frame for frame in current.stack if frame.filename in (PROGRAM, TESTS)]
        current.stack = traceback.StackSummary.from_list(own[-8:])
        pending += filter(None, (current.__cause__, current.__context__))
    return "".join(summary.format())


def _write_error(text):
    with os.fdopen(os.dup(2), "w", encoding="utf-8", errors="replace") as out:
        out.write(text)
