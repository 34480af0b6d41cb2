"""The exception that means: the user can mend this; and what a failure is called."""


class UserError(Exception):
    """Bad input or settings. The message names the file, row or key and says what would be right.

    The jobs under ray_jobs/ print the message without a traceback and exit with status 2.
    """


class AgreedError(UserError):
    """One that all ranks of a training raise at the same step."""


def reason_of(error: Exception) -> str:
    """One line for a table of what failed; UserErrors as they are."""
    if isinstance(error, UserError):
        return str(error)
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"
