"""The one family of errors that ekgfx raises on purpose: what was wrong, the value, what to do."""


class EkgfxError(Exception):
    """Base of every error a user can cause or mend. The command line prints it as one line and exits with 2."""


class TraceError(EkgfxError):
    """The model could not be turned into a graph. module: where, by name; None if that is not known."""

    def __init__(self, message: str, module: str | None = None) -> None:
        super().__init__(message)
        self.module = module


class RuleError(EkgfxError):
    """What an operator's rule says contradicts itself or the traced shapes; or the rule of a user failed."""


class ModelError(EkgfxError):
    """A MODEL argument, a factory or its weights could not be used."""


class DataError(EkgfxError):
    """A data specification, an image or a label could not be used."""


class PlanError(EkgfxError):
    """A plan does not fit the model it is applied to."""


class BudgetError(EkgfxError):
    """Nothing can be pruned, or the budget cannot be reached; says how far it can go."""


class PruneError(EkgfxError):
    """A pruned model did not pass its verification."""


class TrainingError(EkgfxError):
    """Training or search met a value it cannot go on from (NaN or infinite loss, wrong class count)."""


class RecipeError(EkgfxError):
    """A recipe or an option has an unknown key or an unusable value."""


class RunError(EkgfxError):
    """A run directory or a file in it is missing, changed, newer than this version, or cannot be written."""


class ExportError(EkgfxError):
    """A model could not be exported, or the exported file differs from the model."""


class TeamError(EkgfxError):
    """Another process of a job that several share died."""


class EkgfxWarning(UserWarning):
    """Something that a user should know of: what was not seen, and what is done about it."""
