"""Runs a command where the network is cut: `python -m tests.e2e.offline COMMAND…`.

The command gets a network of its own that has nothing but loopback, as after `unshare --net`; nothing needs to be
installed. Where the system lets root alone do that, it gets a user namespace too. Where that is forbidden as well,
every way the model libraries have to the hub leads to a closed port instead. OFFLINE_BY says which.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
import sys
from pathlib import Path

CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 0x1
CLOSED = "http://127.0.0.1:9"


def main(command: list[str]) -> None:
    environment = dict(os.environ)
    try:
        _leave_the_network()
        environment["OFFLINE_BY"] = "network namespace"
    except OSError as error:
        print(f"no network namespace is permitted here ({error}); closed proxies instead", file=sys.stderr)
        environment |= {"OFFLINE_BY": "closed proxies", "HF_ENDPOINT": CLOSED, "no_proxy": "127.0.0.1"}
        environment |= dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), CLOSED)
    os.execvpe(command[0], command, environment)


def _leave_the_network() -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(CLONE_NEWNET) != 0:
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNET) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        # Who we are outside, we stay inside: files are read and written as before.
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(any_socket, SIOCGIFFLAGS, request))[1]
        fcntl.ioctl(any_socket, SIOCSIFFLAGS, struct.pack("16sh14x", b"lo", flags | IFF_UP))


if __name__ == "__main__":
    main(sys.argv[1:])
