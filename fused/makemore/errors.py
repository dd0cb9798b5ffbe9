"""The one error that is the user's to mend."""


class InputError(Exception):
    """Something about a file or an option; the command prints it as one line and exits with 2."""
