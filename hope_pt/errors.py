"""The one exception tree: every mistake a user can make ends in a subclass of `HopeError`.

Each message is one line that says what was wrong, the value, the key or file, and what to do. The command line prints it without a
traceback and exits with `EXIT_USER_ERROR`; any other exception is our bug and exits 1 with its traceback.
"""

EXIT_USER_ERROR = 2
EXIT_DO_NOT_RESTART = 93


class HopeError(Exception):
    """Base of all errors that are the user's to mend."""

    exit_code = EXIT_USER_ERROR


class ConfigError(HopeError):
    """A configuration key, value or combination is wrong."""


class LockedError(HopeError):
    """A run still has a writer. Where a lost node may have left its lock the exit code is 1: an attempt that another may follow."""

    def __init__(self, message: str, *, left: bool):
        super().__init__(message)
        self.exit_code = 1 if left else EXIT_USER_ERROR


class DataError(HopeError):
    """A corpus, tokenizer, shard or manifest is missing, damaged or does not match the run."""


class CheckpointError(HopeError):
    """A checkpoint is missing, damaged, or belongs to another configuration or data set."""


class ParallelError(HopeError):
    """A parallel layout is impossible, or a distributed operation failed on a named rank."""


class EvalError(HopeError):
    """An evaluation cannot run as asked."""


class DivergenceError(HopeError):
    """Training met a value that is not finite; the same command would meet it again, so the exit code is `EXIT_DO_NOT_RESTART`."""

    exit_code = EXIT_DO_NOT_RESTART
