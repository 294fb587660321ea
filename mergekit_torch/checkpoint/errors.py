"""The exception of this package."""


class CheckpointError(ValueError):
    """A checkpoint file is malformed, inconsistent, or no longer the file that was opened.

    The message says what was required and what was found, in which file and for which tensor. A
    file that is not there raises :class:`FileNotFoundError`; a tensor type that is known but has no
    native form raises :class:`NotImplementedError`; failures to write raise :class:`OSError`.
    """
