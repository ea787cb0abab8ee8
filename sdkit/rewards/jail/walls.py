"""Namespaces, an almost empty root and limits around a tested program.  Part of `__main__`."""

import contextlib
import ctypes
import os
import resource
import sys

from calls import call, libc

NEW_USER, NEW_PID, NEW_MOUNTS = 0x10000000, 0x20000000, 0x00020000
NEW_NETWORK, NEW_IPC, NEW_UTS = 0x40000000, 0x08000000, 0x04000000
READ_ONLY, NO_SETUID, NO_DEVICES, NO_EXEC = 1, 2, 4, 8
REMOUNT, BIND, RECURSIVE, PRIVATE = 32, 4096, 16384, 1 << 18
RELATIME, SHOWN_RELATIME = 1 << 21, 4096
DETACHED = 2
ROOT, SCRATCH = "/sys", "/sandbox"
"""Where the new root is put together (nothing from there is kept), and where a program may write in it."""
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
DEVICES = ("null", "zero", "random", "urandom")
THREADS = 64
STRANGER = 1_000_000_000
"""Root is bound by no number of threads: it counts them under an id that nobody has, from here on."""


def be_counted():
    """Have the limit on threads bind root too; its files it still reads."""
    if os.geteuid() == 0:
        for stranger in (STRANGER + os.getpid(), 65534):
            with contextlib.suppress(OSError):
                return os.setresuid(stranger, 0, 0)
    return None


def leave():
    """Into namespaces of one's own; the next child is the first process of its own.  Raises OSError."""
    user, group = os.geteuid(), os.getegid()
    spaces = NEW_USER | NEW_PID | NEW_MOUNTS | NEW_NETWORK | NEW_IPC | NEW_UTS
    call("unshare", spaces)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"{user} {user} 1"),
        ("gid_map", f"{group} {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)


def shut(paths, scratch_bytes):
    """A root with the interpreter, the machine's libraries and `paths`, all read-only, and a folder to write in.

    Raises OSError.
    """
    call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)
    _mount_memory(ROOT, "mode=755,size=1m")
    wanted = [os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib"), *paths]
    for path in LIBRARIES:
        if os.path.islink(path):
            os.symlink(os.readlink(path), ROOT + path)
        else:
            wanted.append(path)
    for path in _outermost(filter(os.path.isdir, wanted)):
        _show(path)
    os.mkdir(f"{ROOT}/dev")
    for name in DEVICES:
        with open(f"{ROOT}/dev/{name}", "w"):
            call("mount", f"/dev/{name}".encode(), f"{ROOT}/dev/{name}".encode(), None, BIND, None)
    os.mkdir(ROOT + SCRATCH)
    if not os.path.exists(f"{ROOT}/tmp"):  # the interpreter itself may lie there
        os.symlink(SCRATCH, f"{ROOT}/tmp")
    os.chdir(ROOT)
    call("pivot_root", b".", b".")
    call("umount2", b".", DETACHED)
    os.chdir("/")
    clean(scratch_bytes)
    locked = READ_ONLY | NO_SETUID | NO_DEVICES
    call("mount", b"none", b"/", None, REMOUNT | BIND | locked, None)


def clean(scratch_bytes):
    """An empty folder to write in, in place of what an earlier case left."""
    os.chdir("/")
    with contextlib.suppress(OSError):
        call("umount2", SCRATCH.encode(), DETACHED)
    _mount_memory(SCRATCH, f"mode=777,size={scratch_bytes},nr_inodes=4096")
    os.chdir(SCRATCH)


def _mount_memory(path, options):
    flags = NO_SETUID | NO_DEVICES | NO_EXEC
    call("mount", b"tmpfs", path.encode(), b"tmpfs", flags, options.encode())


def _outermost(paths):
    """The folders that lie in no other of them."""
    found = []
    for path in sorted({os.path.abspath(path) for path in paths}):
        if not any(path.startswith(known + "/") for known in found):
            found.append(path)
    return found


def _show(path):
    """The folder at its own place in the new root, read-only, whatever is mounted in it included."""
    target = ROOT + path
    os.makedirs(target, mode=0o755, exist_ok=True)
    call("mount", os.path.realpath(path).encode(), target.encode(), None, BIND | RECURSIVE, None)
    for mounted in _mounts():
        if mounted == target or mounted.startswith(target + "/"):
            shown = os.statvfs(mounted).f_flag
            flags = shown & 0xC0F | (RELATIME if shown & SHOWN_RELATIME else 0)
            flags |= REMOUNT | BIND | READ_ONLY | NO_SETUID | NO_DEVICES
            call("mount", b"none", mounted.encode(), None, flags, None)


def _mounts():
    with open("/proc/self/mountinfo", "rb") as handle:
        places = [line.split()[4] for line in handle]
    return [os.fsdecode(place.decode("unicode_escape").encode("latin-1")) for place in places]


def limit(memory_bytes, file_bytes, cpu_seconds, threads):
    """Bind this process, and take from it what root could do."""
    os.umask(0o022)
    for name, most in (
        (resource.RLIMIT_AS, memory_bytes),
        (resource.RLIMIT_FSIZE, file_bytes),
        (resource.RLIMIT_CPU, cpu_seconds),
        (resource.RLIMIT_NPROC, threads),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_MEMLOCK, 0),
        (resource.RLIMIT_MSGQUEUE, 0),
    ):
        _, hard = resource.getrlimit(name)
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(name, (most, most))
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    call("capset", header, (ctypes.c_uint32 * 6)())


def threads_of_the_user():
    """How many threads this process's user has: the limit on them counts those of every process."""
    found, own = 0, os.getresuid()[0]
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as handle:
            fields = dict(line.split(b":", 1) for line in handle if b":" in line)
            found += int(fields[b"Threads"]) if int(fields[b"Uid"].split()[0]) == own else 0
    return found


def die_with_parent():
    """Be ended when the parent is, however it ends."""
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL


def be_private():
    """Let no other process without capabilities look into this one's memory and pipes."""
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
