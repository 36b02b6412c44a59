"""Become another program that the kernel ends when the process that asked for it ends: `_exec.py PARENT_PID PROGRAM ARGUMENT...`.

A program rather than a `preexec_fn`, which may deadlock in a process with threads. The pid stays the same.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1

if __name__ == "__main__":
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(sys.argv[1]):  # it ended before the line above
        sys.exit("the process that started this one is gone")
    os.execv(sys.argv[2], sys.argv[2:])
