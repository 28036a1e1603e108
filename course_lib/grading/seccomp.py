"""Refuses system calls that no notebook needs and that attacks on the kernel begin with.

A second wall: namespaces and capabilities refuse most of these already. It also closes ways to hold
memory that no limit counts. A refused call fails with "operation not permitted"; nothing is killed.
Source: `man 2 seccomp`, the kernel's `filter.h`, and its tables of system calls.
"""

from __future__ import annotations

import ctypes
import errno
import platform
import struct

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
_RETURN_ALLOW, _RETURN_ERRNO = 0x7FFF0000, 0x00050000
_LOAD_WORD, _JUMP_EQUAL, _JUMP_AT_LEAST, _RETURN = 0x20, 0x15, 0x35, 0x06
_OFFSET_NUMBER, _OFFSET_ARCHITECTURE = 0, 4
_OTHER_ABI = 0x40000000
"""On x86-64, numbers from here on are those of x32."""

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
KNOWN = tuple(_ARCHITECTURES)
"""Machines whose numbers of system calls stand here."""

# Name: number on x86-64, on ARM.
_REFUSED = {
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "unshare": (272, 97),
    "setns": (308, 268),
    "mount": (165, 40),
    "umount2": (166, 39),
    "pivot_root": (155, 41),
    "chroot": (161, 51),
    "open_tree": (428, 428),
    "move_mount": (429, 429),
    "fsopen": (430, 430),
    "fsconfig": (431, 431),
    "fsmount": (432, 432),
    "fspick": (433, 433),
    "mount_setattr": (442, 442),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426),
    "io_uring_register": (427, 427),
    "init_module": (175, 105),
    "finit_module": (313, 273),
    "delete_module": (176, 106),
    "kexec_load": (246, 104),
    "kexec_file_load": (320, 294),
    "reboot": (169, 142),
    "swapon": (167, 224),
    "swapoff": (168, 225),
    "acct": (163, 89),
    "quotactl": (179, 60),
    "syslog": (103, 116),
    "personality": (135, 92),
    "memfd_secret": (447, 447),
}
_MEMORY_FILE = {"memfd_create": (319, 279)}
"""Memory that belongs to no process. CUDA's driver may want it."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_char_p))


def install(*, memory_files: bool) -> bool:
    """Refuse these calls for this process and all that it starts, for good.

    Args:
        memory_files: Allow files in memory, for CUDA.

    Returns:
        Whether it was done; False on an architecture whose numbers are not known here.

    Raises:
        OSError: If the kernel takes no filter.
    """
    machine = platform.machine()
    if machine not in _ARCHITECTURES:
        return False
    code = _filter(machine, _REFUSED if memory_files else {**_REFUSED, **_MEMORY_FILE})
    program = _Program(len(code) // 8, code)
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        _PR_SET_SECCOMP, _MODE_FILTER, ctypes.byref(program), 0, 0
    ):
        raise OSError(ctypes.get_errno(), "the filter of system calls was not taken")
    return True


def _filter(machine: str, refused: dict[str, tuple[int, int]]) -> bytes:
    column = list(_ARCHITECTURES).index(machine)
    numbers = sorted(each[column] for each in refused.values())
    refuse = _RETURN_ERRNO | errno.EPERM
    lines = [
        # The calls of another architecture have other numbers: all of them are refused.
        (_LOAD_WORD, 0, 0, _OFFSET_ARCHITECTURE),
        (_JUMP_EQUAL, 1, 0, _ARCHITECTURES[machine]),
        (_RETURN, 0, 0, refuse),
        (_LOAD_WORD, 0, 0, _OFFSET_NUMBER),
        (_JUMP_AT_LEAST, len(numbers) + 1, 0, _OTHER_ABI),
    ]
    for index, number in enumerate(numbers):
        lines.append((_JUMP_EQUAL, len(numbers) - index, 0, number))
    lines += [(_RETURN, 0, 0, _RETURN_ALLOW), (_RETURN, 0, 0, refuse)]
    return b"".join(struct.pack("=HBBI", *line) for line in lines)
