"""Read the memory of a process from Linux."""


def status_bytes(status: str, field: str) -> int:
    """Returns a field such as VmRSS of the text of /proc/PID/status, or 0 if it is not there.

    The text of a process that has just ended has no memory fields.
    """
    lines = [line for line in status.splitlines() if line.startswith(field + ":")]
    return int(lines[0].split()[1]) * 1024 if lines else 0
