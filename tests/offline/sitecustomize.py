"""Reaching out to other machines is an error, in the process of the tests and in those it starts.

Its folder is on the path of those: Python imports a module of this name when it starts. What is
watched are the audit events of the module `socket`; sockets of this machine (pairs, Unix sockets,
loopback addresses) are left alone, and those that compiled libraries open for themselves (Ray's,
ZeroMQ's) are not seen.
"""

import os
import sys

ALLOWED = "GENLM_BYTES_SMC_TESTS_MAY_CONNECT"  # set in the environment by tests that must
_ADDRESS = ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
_NAME = ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr")


class SocketOpenedError(BaseException):
    """Not an Exception, so that no handler of ordinary errors hides it."""


def _near(host):
    """Whether a host's name or address, as `socket` takes it, is of this machine alone."""
    if isinstance(host, bytes):
        host = host.decode("ascii", "replace")
    if host in ("localhost", os.uname().nodename):
        return True
    from ipaddress import ip_address  # not at the start of every process

    try:
        return ip_address(host.partition("%")[0]).is_loopback
    except ValueError:
        return False


def _watch(event, arguments):
    if event in _ADDRESS:
        address = arguments[1]
        host = address[0] if isinstance(address, tuple) else None  # else a path or nothing
    elif event in _NAME:
        host = arguments[0]
    else:
        return
    if isinstance(host, str | bytes) and not _near(host) and ALLOWED not in os.environ:
        raise SocketOpenedError(f"{event} of {host!r} in a test run")


sys.addaudithook(_watch)
# A worker of the tests has imported this at its start; the tests import it once more by this name.
sys.modules.setdefault("tests.offline.sitecustomize", sys.modules[__name__])
