"""What Linux offers for keeping processes apart and Python 3.11 has no function for."""

import ctypes
import fcntl
import os
import signal
import socket
import struct

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWIPC = 0x00020000, 0x04000000, 0x08000000
CLONE_NEWPID, CLONE_NEWNET = 0x20000000, 0x40000000
MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 1, 32, 4096, 16384, 1 << 18
_PR_SET_PDEATHSIG, _PR_CAPBSET_DROP = 1, 24
_CHANGES_A_MACHINE = {
    "SYS_MODULE": 16,
    "SYS_RAWIO": 17,
    "SYS_BOOT": 22,
    "SYS_TIME": 25,
    "MKNOD": 27,
}
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def unshare(flags: int) -> None:
    """Gives the calling thread namespaces of its own."""
    _call("unshare", flags)


def enter_network(namespace: int) -> None:
    """Moves the calling thread into the network namespace of an open file."""
    _call("setns", namespace, CLONE_NEWNET)


def mount(source: str, target: str, kind: str = "", flags: int = 0, options: str = "") -> None:
    """Raises OSError, with the target in its words."""
    words = (word.encode() or None for word in (source, target, kind))
    _call("mount", *words, ctypes.c_ulong(flags), options.encode() or None, about=target)


def show(source: str, target: str, read_only: bool = False) -> None:
    """Shows a file or folder at another place, too."""
    mount(source, target, flags=MS_BIND)
    if read_only:
        mount("", target, flags=MS_BIND | MS_REMOUNT | MS_RDONLY)


def give_up_machine() -> None:
    """Takes from programs that are started from now on what root may do to the whole machine."""
    for number in _CHANGES_A_MACHINE.values():
        _call("prctl", _PR_CAPBSET_DROP, number, 0, 0, 0)


def die_with_parent(parent: int) -> None:
    """Has the kernel kill this process when the thread that started it ends."""
    _call("prctl", _PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)


def start_loopback() -> None:
    """Starts the loopback interface of the calling thread's network namespace."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as handle:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(handle, _SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(handle, _SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | _IFF_UP))


def _call(name: str, *arguments: object, about: str = "") -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name} {about}: {os.strerror(number)}")
