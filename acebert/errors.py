"""The exception that means: the user can mend this."""


class UserError(Exception):
    """Bad input or settings. The message names the file, row or key and says what would be right.

    The jobs under ray_jobs/ print the message without a traceback and exit with status 2.
    """


class AgreedError(UserError):
    """One that all ranks of a training raise at the same step."""
