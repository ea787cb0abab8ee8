"""The first process of a sandbox: builds it, runs one program in it, and lets nothing outlive the program.

A script of the standard library alone, started by `rewards_sandbox`, never imported.  Three processes: this one, a
keeper and the program.  Where namespaces are used the keeper is their first process, so everything dies with it, and
signals of the program cannot reach it.  How the program ended goes to a pipe that the program does not have.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import resource
import signal
import sys
import time

NOBODY = 65534
BOX = "/box"  # where the program finds its files
REPORT = 3  # the file number to which it may report
NEW_NS, NEW_IPC, NEW_USER, NEW_PID, NEW_NET = 0x20000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
RDONLY, NOSUID, NODEV, BIND, REC, PRIVATE = 1, 2, 4, 4096, 16384, 1 << 18
DIE_WITH_PARENT, DUMPABLE, NO_NEW_PRIVILEGES, ADOPT_ORPHANS = 1, 4, 38, 36
SET_MOUNT_ATTRIBUTES, RECURSIVE, HERE, DETACH = 442, 0x8000, -100, 2
LIBRARIES = ("/lib", "/lib32", "/lib64", "/usr/lib", "/usr/lib32", "/usr/lib64", "/nix/store")
FOR_NETWORK = ("/etc/resolv.conf", "/etc/hosts", "/etc/nsswitch.conf", "/etc/ssl")

libc = ctypes.CDLL(None, use_errno=True)


class Stop(BaseException):
    """The deadline has passed, or the trainer wants the program to end."""


def call(name, *arguments):
    """A function of the C library; raises OSError, named after it, where it fails."""
    arguments = [a.encode() if isinstance(a, str) else a for a in arguments]
    if getattr(libc, name)(*arguments) == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def main():
    job = json.loads(sys.argv[1])
    status, job["status"] = job["status"], fcntl.fcntl(job["status"], fcntl.F_DUPFD_CLOEXEC, 10)
    os.close(status)
    call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != job["parent"]:
        os._exit(1)  # the trainer died in between
    with contextlib.suppress(OSError):
        write(
            "/proc/self/oom_score_adj", "1000"
        )  # short of memory, the kernel takes this one first
    signal.signal(signal.SIGTERM, stop)
    signal.signal(signal.SIGALRM, stop)
    try:
        job["files"] = {entry.name: read(entry.path) for entry in os.scandir(job["folder"])}
        if job["isolated"]:
            enter_namespaces(job)
        else:
            call("prctl", ADOPT_ORPHANS, 1, 0, 0, 0)
        keeper = os.fork()
        if keeper == 0:
            keep(job)
        supervise(keeper, None, alone=job["isolated"])
    except OSError as error:
        tell(job, refused=f"{error.strerror or error}")
    except Stop:
        pass
    os._exit(0)


def stop(_number, _frame):
    raise Stop


def tell(job, **what):
    os.write(job["status"], json.dumps(what).encode() + b"\n")


def read(path):
    with open(path, "rb") as handle:
        return handle.read()


def write(path, text):
    with open(path, "wb") as handle:
        handle.write(text if isinstance(text, bytes) else text.encode())


# ── namespaces ────────────────────────────────────────────────────────────────────────────────


def enter_namespaces(job):
    """New user, mount, process, IPC and (unless the network is allowed) network namespaces.

    Outside, only the caller's own id is used; root also gets nobody's, for the program: the kernel lets root's
    processes pass the limit on processes.  A process outside must write the maps.
    """
    here, (ready, go) = os.getpid(), os.pipe()
    helper = os.fork()
    if helper == 0:
        os.close(go)
        os.read(ready, 1)
        with contextlib.suppress(OSError):
            map_ids(here)
            os._exit(0)
        os._exit(1)
    try:
        call("unshare", NEW_USER | NEW_NS | NEW_PID | NEW_IPC | (0 if job["network"] else NEW_NET))
    finally:
        os.close(go)
        _, status = os.waitpid(helper, 0)
    if status:
        raise OSError(0, "the ids of a user namespace cannot be mapped")


def map_ids(process):
    for name, own in (("uid", os.geteuid()), ("gid", os.getegid())):
        if own == 0:
            text = f"0 0 1\n{NOBODY} {NOBODY} 1\n"
        else:
            if name == "gid":
                write(f"/proc/{process}/setgroups", "deny")
            text = f"{NOBODY} {own} 1\n"
        write(f"/proc/{process}/{name}_map", text)


def build_root(job):
    """A file system of its own: libraries and the interpreter to read, a small folder in memory to write."""
    root = job["folder"]
    call("mount", None, "/", None, REC | PRIVATE, None)
    size = f"size={job['disk_mib']}m,nr_inodes=4096,mode=0755"
    call("mount", "tmpfs", root, "tmpfs", NOSUID | NODEV, size)
    shown = [*LIBRARIES, *job["interpreter"], "/etc/ld.so.cache"]
    for path in shown + list(FOR_NETWORK if job["network"] else ()):
        show(path, root + path)
    for path in ("/dev/null", "/dev/zero", "/dev/urandom"):
        bind(path, root + path)
    os.mkdir(root + "/proc")
    with contextlib.suppress(
        OSError
    ):  # a container may hide parts of /proc, and so forbid a new one
        call("mount", "proc", root + "/proc", "proc", NOSUID | NODEV, None)
    for folder in (BOX, "/tmp"):
        os.mkdir(root + folder)
        os.chmod(root + folder, 0o777)
    for setting in ("user/max_user_namespaces", "kernel/shmmni"):
        with contextlib.suppress(OSError):
            write(f"/proc/sys/{setting}", "0")
    os.chdir(root)
    call("pivot_root", ".", ".")
    call("umount2", ".", DETACH)
    fill(BOX, job["files"])
    os.chdir(BOX)


def show(path, target):
    if os.path.islink(path) and not os.path.lexists(target):
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.symlink(os.readlink(path), target)
    elif os.path.exists(path) and not os.path.exists(target):
        bind(path, target)


def bind(path, target):
    """The same file or folder at another place, to read."""
    if os.path.isdir(path):
        os.makedirs(target, exist_ok=True)
    else:
        os.makedirs(os.path.dirname(target), exist_ok=True)
        write(target, "")
    call("mount", path, target, None, BIND | REC, None)
    attributes = (ctypes.c_uint64 * 4)(RDONLY | NOSUID, 0, 0, 0)
    call("syscall", SET_MOUNT_ATTRIBUTES, HERE, target, RECURSIVE, attributes, 32)


def fill(folder, files):
    for name, content in files.items():
        write(os.path.join(folder, name), content)


# ── the keeper and the program ────────────────────────────────────────────────────────────────


def keep(job):
    """Start the program, wait for it, say how it ended, end all that is left."""
    try:
        call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        call("prctl", DUMPABLE, 0, 0, 0, 0)  # the program cannot look into its keeper
        if job["isolated"]:
            build_root(job)
        else:
            os.chdir(job["folder"])
            call("prctl", ADOPT_ORPHANS, 1, 0, 0, 0)
        program = os.fork()
        if program == 0:
            become_program(job)
        for stream in (0, 1, 2, job["report"]):
            os.close(stream)
        status = supervise(program, job["seconds"], alone=job["isolated"])
        if os.WIFEXITED(status):
            tell(job, exit=os.WEXITSTATUS(status))
        else:
            tell(job, signal=os.WTERMSIG(status))
    except OSError as error:
        tell(job, refused=f"{error.strerror or error}")
    except Stop:
        tell(job, late=True)
    os._exit(0)


def supervise(child, seconds, *, alone):
    """Wait for the child; afterwards kill whatever else it left, unless a namespace does (`alone`)."""
    try:
        if seconds is not None:
            signal.setitimer(signal.ITIMER_REAL, seconds)
        while True:
            found, status = os.wait()
            if found == child:
                signal.setitimer(signal.ITIMER_REAL, 0)
                return status
    finally:
        if not alone:
            sweep(child)


def sweep(child):
    until = time.monotonic() + 2
    left = [child]
    while left and time.monotonic() < until:
        for process in left:
            with contextlib.suppress(OSError):
                os.kill(process, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        left = children()


def children():
    return [int(p) for p in read(f"/proc/self/task/{os.getpid()}/children").split()]


def become_program(job):
    """The last steps before the program: limits, no privileges, no files but stdin, stdout, stderr and the report."""
    try:
        os.setsid()
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        if os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        call("prctl", NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        call("prctl", DIE_WITH_PARENT, signal.SIGKILL, 0, 0, 0)
        if job["report"] != REPORT:
            os.dup2(job["report"], REPORT)
            os.close(job["report"])
        for name, value in job["limits"].items():
            if name == "NPROC" and not job["isolated"]:
                value += tasks_of(os.geteuid())  # the limit counts all of the user's
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))
        os.execve(job["command"][0], job["command"], job["environment"])
    except OSError as error:
        tell(job, refused=f"{job['command'][0]}: {error.strerror or error}")
    os._exit(1)


def tasks_of(user):
    found = 0
    for name in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if os.stat(f"/proc/{name}").st_uid == user:
                found += len(os.listdir(f"/proc/{name}/task"))
    return found


if __name__ == "__main__":
    main()
