"""The errors a user can meet, each with the exit code that the commands give it."""


class FunclossError(Exception):
    """A failure that the user can act on: one line that says what happened and the way out."""

    exit_code = 1


class DataError(FunclossError):
    """Data that cannot be found, fetched, read or trusted."""


class UnavailableError(DataError):
    """Data that is not here and cannot be fetched, which is no fault of the data's."""


class RunError(FunclossError):
    """A run folder that cannot be written, read or resumed."""


class AuditError(FunclossError):
    """An audit that cannot be made, or whose numbers do not agree with each other."""


class ConfigError(FunclossError):
    """A request that makes no sense: an unknown name, a value out of range, options that clash."""

    exit_code = 2
