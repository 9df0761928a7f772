"""Names of files that may come from elsewhere: one plain name, on every system."""

__all__ = ["check_file_name"]

DEVICES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{i}" for port in ("com", "lpt") for i in range(10)),
}
FORBIDDEN = set('<>:"/\\|?*')  # by Windows; a slash by all
LONGEST = 200  # bytes; file systems take 255, and a file has a longer name while it is written


def check_file_name(name: str) -> str:
    """A name that stays in its directory and means a file on every system.

    Raises:
        ValueError: it has a separator, a character that cannot be printed or that Windows forbids;
            is `.`, `..` or empty, or ends in a dot or a space; is too long; or is a device of
            Windows, such as `CON` or `nul.txt`.

    >>> check_file_name("losses.png")
    'losses.png'
    """
    bad = not name.isprintable() or FORBIDDEN & set(name) or name.endswith((".", " "))
    device = name.partition(".")[0].rstrip().lower() in DEVICES
    if not name or bad or device or len(name.encode(errors="replace")) > LONGEST:
        raise ValueError(
            f"{name[:60]!a} is no name for a file: it has to be one plain name of at most "
            f"{LONGEST} bytes, without separators, and no device of Windows."
        )
    return name
