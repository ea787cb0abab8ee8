"""Isolation of a tested program: namespaces, a minimal root file system, limits.  Part of `__main__`."""

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
RELATIME, STATVFS_RELATIME = 1 << 21, 4096
DETACHED = 2
ROOT, SCRATCH = "/sys", "/sandbox"
"""Where the new root is built (which hides the old contents), and where a program may write in it."""
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")
DEVICES = ("null", "zero", "random", "urandom")
THREADS = 64
UNUSED_USER = 1_000_000_000
"""The limit on threads does not apply to root, so root runs under an unused user id, from here on."""


def count_threads_of_root():
    """Makes the limit on threads apply to root too, which can still read its files."""
    if os.geteuid() == 0:
        for user in (UNUSED_USER + os.getpid(), 65534):
            with contextlib.suppress(OSError):
                return os.setresuid(user, 0, 0)
    return None


def enter_namespaces():
    """Enters new namespaces; the next child is the first process of the new PID namespace.  Raises OSError."""
    user, group = os.geteuid(), os.getegid()
    spaces = NEW_USER | NEW_PID | NEW_MOUNTS | NEW_NETWORK | NEW_IPC | NEW_UTS
    call("unshare", spaces)
    for name, text in (("setgroups", "deny"), ("uid_map", f"{user} {user} 1"), ("gid_map", f"{group} {group} 1")):
        with open(f"/proc/self/{name}", "w") as handle:
            handle.write(text)


def build_root(paths, scratch_bytes):
    """Switches to a root with the interpreter, the system libraries and `paths`, read-only, and a writable folder.

    Raises OSError.
    """
    call("mount", b"none", b"/", None, RECURSIVE | PRIVATE, None)
    _mount_tmpfs(ROOT, "mode=755,size=1m")
    folders = [os.path.dirname(os.__file__), os.path.join(sys.base_prefix, "lib"), *paths]
    for path in LIBRARIES:
        if os.path.islink(path):
            os.symlink(os.readlink(path), ROOT + path)
        else:
            folders.append(path)
    for path in _outermost(filter(os.path.isdir, folders)):
        _bind_read_only(path)
    os.mkdir(f"{ROOT}/dev")
    for name in DEVICES:
        with open(f"{ROOT}/dev/{name}", "w"):
            call("mount", f"/dev/{name}".encode(), f"{ROOT}/dev/{name}".encode(), None, BIND, None)
    os.mkdir(ROOT + SCRATCH)
    if not os.path.exists(f"{ROOT}/tmp"):  # the interpreter itself may be there
        os.symlink(SCRATCH, f"{ROOT}/tmp")
    os.chdir(ROOT)
    call("pivot_root", b".", b".")
    call("umount2", b".", DETACHED)
    os.chdir("/")
    reset_scratch(scratch_bytes)
    locked = READ_ONLY | NO_SETUID | NO_DEVICES
    call("mount", b"none", b"/", None, REMOUNT | BIND | locked, None)


def reset_scratch(scratch_bytes):
    """Replaces the writable folder with an empty one."""
    os.chdir("/")
    with contextlib.suppress(OSError):
        call("umount2", SCRATCH.encode(), DETACHED)
    _mount_tmpfs(SCRATCH, f"mode=777,size={scratch_bytes},nr_inodes=4096")
    os.chdir(SCRATCH)


def _mount_tmpfs(path, options):
    flags = NO_SETUID | NO_DEVICES | NO_EXEC
    call("mount", b"tmpfs", path.encode(), b"tmpfs", flags, options.encode())


def _outermost(paths):
    """The folders that are not inside another of them."""
    outermost = []
    for path in sorted({os.path.abspath(path) for path in paths}):
        if not any(path.startswith(known + "/") for known in outermost):
            outermost.append(path)
    return outermost


def _bind_read_only(path):
    """Binds the folder to the same path in the new root, read-only, with all mounts inside it."""
    target = ROOT + path
    os.makedirs(target, mode=0o755, exist_ok=True)
    call("mount", os.path.realpath(path).encode(), target.encode(), None, BIND | RECURSIVE, None)
    for mounted in _mount_points():
        if mounted == target or mounted.startswith(target + "/"):
            current = os.statvfs(mounted).f_flag
            flags = current & 0xC0F | (RELATIME if current & STATVFS_RELATIME else 0)
            flags |= REMOUNT | BIND | READ_ONLY | NO_SETUID | NO_DEVICES
            call("mount", b"none", mounted.encode(), None, flags, None)


def _mount_points():
    with open("/proc/self/mountinfo", "rb") as handle:
        places = [line.split()[4] for line in handle]
    return [os.fsdecode(place.decode("unicode_escape").encode("latin-1")) for place in places]


def set_limits(memory_bytes, file_bytes, cpu_seconds, threads):
    """Sets the resource limits of this process and drops its capabilities."""
    os.umask(0o022)
    for name, value in (
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
        bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (bound, bound))
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    call("capset", header, (ctypes.c_uint32 * 6)())


def count_user_threads():
    """Returns the number of threads of this process's user in all processes, which the limit counts too."""
    threads, user = 0, os.getresuid()[0]
    for pid in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{pid}/status", "rb") as handle:
            fields = dict(line.split(b":", 1) for line in handle if b":" in line)
            threads += int(fields[b"Threads"]) if int(fields[b"Uid"].split()[0]) == user else 0
    return threads


def die_with_parent():
    """Kills this process when its parent ends, however that happens."""
    libc.prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG, SIGKILL


def forbid_inspection():
    """Keeps other processes without capabilities from reading this one's memory and pipes."""
    libc.prctl(4, 0, 0, 0, 0)  # PR_SET_DUMPABLE
