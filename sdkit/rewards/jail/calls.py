"""System calls that a tested program may not make: a classic BPF filter for prctl(2).  Part of `__main__`.

A program may start threads, never processes, so killing it ends everything that it started, with or without namespaces.
"""

import ctypes
import errno
import os
import platform
import struct

NUMBERS = {"x86_64": 0, "aarch64": 1}
"""Index of the machine's number in the pairs of call numbers."""

_ARCHITECTURE = (0xC000003E, 0xC00000B7)  # AUDIT_ARCH_X86_64, AUDIT_ARCH_AARCH64
_X32 = 0x40000000  # call numbers from here on are the x32 table of x86_64

# Each call with its numbers on both machines.
DENIED = (
    # other processes: none may be started, signalled, read, traced or slowed down
    "fork 57 -, vfork 58 -, execve 59 221, execveat 322 281, kill 62 129, tkill 200 130, tgkill 234 131, "
    "rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240, pidfd_send_signal 424 424, pidfd_open 434 434, "
    "pidfd_getfd 438 438, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271, "
    "process_madvise 440 440, kcmp 312 272, setsid 112 157, setpgid 109 154, setpriority 141 140, "
    "ioprio_set 251 30, sched_setaffinity 203 122, sched_setscheduler 144 119, sched_setparam 142 118, "
    "sched_setattr 314 274, migrate_pages 256 238, move_pages 279 239, "
    # isolation: namespaces, limits and the identity of the process may not change
    "unshare 272 97, setns 308 268, setuid 105 146, setreuid 113 145, setresuid 117 147, setgid 106 144, "
    "setregid 114 143, setresgid 119 149, setgroups 116 159, capset 126 91, prctl 157 167, personality 135 92, "
    "seccomp 317 277, bpf 321 280, perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425, "
    "io_uring_enter 426 426, io_uring_register 427 427, add_key 248 217, request_key 249 218, keyctl 250 219, "
    # the network; socketpair stays allowed
    "socket 41 198, "
    # memory that is not covered by a limit or outlives the process
    "memfd_create 319 279, memfd_secret 447 447, shmget 29 194, msgget 68 186, semget 64 190, mq_open 240 180, "
)

WRITING = (
    "creat 85 -, openat2 437 437, link 86 -, linkat 265 37, symlink 88 -, symlinkat 266 36, unlink 87 -, "
    "unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276, mkdir 83 -, mkdirat 258 34, rmdir 84 -, "
    "mknod 133 -, mknodat 259 33, truncate 76 45, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, "
    "chown 92 -, lchown 94 -, fchown 93 55, fchownat 260 54, utime 132 -, utimes 235 -, futimesat 261 -, "
    "utimensat 280 88, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7, removexattr 197 14, "
    "lremovexattr 198 15, fremovexattr 199 16, "
)
"""Calls that change files; denied only without a mount namespace, which hides the machine's files."""

_CLONE, _CLONE3, _PRLIMIT = (56, 220), (435, 435), (302, 261)
_OPEN, _OPENAT = (2, None), (257, 56)
_THREAD = 0x10000  # CLONE_THREAD
_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_KILL, _ALLOW, _REFUSE = 0x80000000, 0x7FFF0000, 0x00050000
_NUMBER, _MACHINE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data

libc = ctypes.CDLL(None, use_errno=True)


def call(name, *arguments):
    """Calls a function of libc.  Raises OSError that names the function."""
    if getattr(libc, name)(*arguments) < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def forbid(files):
    """Denies the calls above to this process from now on; with `files`, also those that change files.

    Raises OSError if the kernel has no seccomp filters.
    """
    program = _assemble(NUMBERS[platform.machine()], files)
    code = ctypes.create_string_buffer(program)
    filters = struct.pack("HxxxxxxP", len(program) // 8, ctypes.addressof(code))
    call("prctl", 38, 1, 0, 0, 0)  # PR_SET_NO_NEW_PRIVS
    call("prctl", 22, 2, ctypes.create_string_buffer(filters), 0, 0)  # PR_SET_SECCOMP, by filter


def _assemble(machine, files):
    def argument(place):
        return _ARGUMENTS + 8 * place

    out = [(_LOAD, 0, 0, _MACHINE), (_EQUAL, 1, 0, _ARCHITECTURE[machine]), (_RETURN, 0, 0, _KILL)]
    out += [(_LOAD, 0, 0, _NUMBER), (_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, _KILL)]
    out += _if_called(_CLONE[machine], argument(0), (_ANY_BIT, 1, 0, _THREAD))
    out += _if_called(_PRLIMIT[machine], argument(0), (_EQUAL, 1, 0, 0))  # only its own limits
    if files:
        out += _if_called(_OPEN[machine], argument(1), (_ANY_BIT, 0, 1, _TO_WRITE))
        out += _if_called(_OPENAT[machine], argument(2), (_ANY_BIT, 0, 1, _TO_WRITE))
    # A filter cannot see the flags of clone3; without it, libc uses clone.
    out += [(_EQUAL, 0, 1, _CLONE3[machine]), (_RETURN, 0, 0, _REFUSE | errno.ENOSYS)]
    for denied in filter(None, (DENIED + WRITING if files else DENIED).split(", ")):
        number = denied.split()[1 + machine]
        if number != "-":
            out += [(_EQUAL, 0, 1, int(number)), (_RETURN, 0, 0, _REFUSE | errno.EPERM)]
    out += [(_RETURN, 0, 0, _ALLOW)]
    return b"".join(struct.pack("HBBI", *line) for line in out)


def _if_called(number, argument, test):
    """Filters a call by an argument: `test` jumps over the refusal if the call is allowed."""
    if number is None:
        return []
    refusal = [(_RETURN, 0, 0, _REFUSE | errno.EPERM), (_RETURN, 0, 0, _ALLOW)]
    return [(_EQUAL, 0, 4, number), (_LOAD, 0, 0, argument), test, *refusal]
