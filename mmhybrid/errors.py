"""Errors that a person can act on."""

import errno

__all__ = ['NO_WRITING', 'UserError', 'check_given']

#: Errors of the system after which nothing can be written.
NO_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class UserError(ValueError):
    """Something the user can put right. The tools print its text without a traceback."""


def check_given(args, *names: str) -> None:
    """Raise UserError for an option that is there but empty, as an unset shell variable makes it.

    Args:
        args: the parsed command line.
        names: attributes of it.
    """
    for name in names:
        value = getattr(args, name, None)
        if isinstance(value, str) and not value.strip():
            option = name if name in ('config', 'checkpoint') else f'--{name.replace("_", "-")}'
            raise UserError(f'{option} is empty. Expected a path; leave the option out if it is '
                            'not needed. (Is a variable of the shell not set?)')
