"""`WardenError`: what every failure carries, how it is registered, and how it is written down."""

from __future__ import annotations

from enum import StrEnum
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any, ClassVar, Self

from .envelope import causes_of, envelope
from .redaction import cleaned
from .registry import register
from .values import JSON, fill, jsonable


class Retry(StrEnum):
    """What has to happen before the same thing is worth trying again."""

    NEVER = "never"
    """Nothing helps but another request."""
    BACKOFF = "backoff"
    """Wait and try again: the cause is outside and passes."""
    AFTER_CHANGE = "after_change"
    """A person, or a policy, changes something first."""
    AFTER_COOLDOWN = "after_cooldown"
    """Wait until the hardware has recovered."""
    RESUME = "resume"
    """Start again from the checkpoint; nothing was wrong."""


_RETRYABLE = frozenset({Retry.BACKOFF, Retry.AFTER_COOLDOWN, Retry.RESUME})
_CONTEXT = ("run_id", "steps_completed", "checkpoint_path", "resume_command")


class WardenError(Exception):
    """Root of everything that trainwarden raises on purpose.

    One subclass per condition. The subclass is the single source: its class keywords fix the code and the
    statuses, its annotations name the typed details, its template makes the message, and its docstring is its
    documentation page. Defining a subclass checks all of this (TypeError) and registers it.

    A subclass without `code` is a family: it can be caught, never raised.
    """

    code: ClassVar[str] = ""
    prefix: ClassVar[str] = ""
    exit_code: ClassVar[int] = 0
    http_status: ClassVar[int] = 0
    retry: ClassVar[Retry]
    aliases: ClassVar[tuple[str, ...]] = ()
    fields: ClassVar[dict[str, str]] = {}
    """Name and type, as written, of each declared detail."""
    template: ClassVar[str] = ""
    """``{name}`` is filled from the details; a part in [brackets] is dropped when its detail is unknown."""

    suggestion: str = ""
    details: dict[str, JSON]
    run_id: str | None
    steps_completed: int | None
    checkpoint_path: str | None
    resume_command: str | None
    earlier_causes: list[dict[str, JSON]]
    """What was known of the causes before the error travelled between processes."""

    def __init_subclass__(
        cls,
        *,
        code: str | None = None,
        prefix: str | None = None,
        exit_code: int | None = None,
        http_status: int | None = None,
        retry: Retry | None = None,
        aliases: tuple[str, ...] = (),
    ) -> None:
        super().__init_subclass__()
        if code is None and cls.code:
            raise TypeError(f"{cls.__qualname__} needs a code of its own: one class per condition")
        settings = {
            "code": code,
            "prefix": prefix,
            "exit_code": exit_code,
            "http_status": http_status,
            "retry": retry,
        }
        for name, value in settings.items():
            if value is not None:
                setattr(cls, name, value)
        cls.aliases = tuple(aliases)
        cls.fields = _declared_fields(cls)
        if code is not None:
            register(cls)

    def __init__(
        self,
        *,
        suggestion: str | None = None,
        run_id: str | None = None,
        steps_completed: int | None = None,
        checkpoint_path: str | PathLike[str] | None = None,
        resume_command: str | None = None,
        **details: object,
    ) -> None:
        """Raise with the details of this case; a detail that JSON cannot hold is kept as a string."""
        if not self.code:
            raise TypeError(f"{type(self).__qualname__} is a family of errors: raise one of its conditions")
        self.details = {name: jsonable(value) for name, value in details.items()}
        if suggestion is not None:
            self.suggestion = suggestion
        self.run_id = run_id
        self.steps_completed = steps_completed
        self.checkpoint_path = None if checkpoint_path is None else fspath(checkpoint_path)
        self.resume_command = resume_command
        self.earlier_causes = []
        super().__init__(self.message)

    @property
    def message(self) -> str:
        """What happened, as one sentence: the template filled from the details. Sinks redact it."""
        return fill(self.template, self.details)

    @property
    def retryable(self) -> bool:
        """Whether the same thing may be tried again without a change (`retry` says when)."""
        return self.retry in _RETRYABLE

    def add_context(
        self,
        *,
        run_id: str | None = None,
        steps_completed: int | None = None,
        checkpoint_path: str | PathLike[str] | None = None,
        resume_command: str | None = None,
    ) -> Self:
        """Fill in what is still unknown about the run; what is known stays, as who raised it knew best."""
        known = {
            "run_id": run_id,
            "steps_completed": steps_completed,
            "checkpoint_path": None if checkpoint_path is None else fspath(checkpoint_path),
            "resume_command": resume_command,
        }
        for name, value in known.items():
            if getattr(self, name) is None:
                setattr(self, name, value)
        return self

    def to_dict(self) -> dict[str, JSON]:
        """The error as one JSON object, redacted. See `trainwarden.errors.envelope` for the keys."""
        return envelope(self)

    def to_json(self, *, indent: int | None = None) -> str:
        """`to_dict` as strict JSON, in ASCII."""
        import json

        return json.dumps(self.to_dict(), indent=indent, allow_nan=False)

    def __str__(self) -> str:
        # Tracebacks and loggers print this without asking us, so it is a sink too.
        message = cleaned({"message": self.message}).get("message", "(withheld: it could not be redacted)")
        return f"[{self.code}] {message}"

    def __reduce__(self) -> tuple[Any, ...]:
        # The default would call the class with the message as its only argument. The chain of causes does not
        # travel with a pickled exception (and may not be picklable), so its summary does.
        state = {**self.__dict__, "earlier_causes": causes_of(self)}
        return _rebuild, (type(self), self.args), state

    if not TYPE_CHECKING:  # declared details read as attributes; mypy sees the declarations

        def __getattr__(self, name: str) -> JSON:
            details = self.__dict__.get("details", {})
            if name in details:
                return details[name]
            if any(name in vars(base).get("fields", ()) for base in type(self).__mro__):
                return None
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")


def _rebuild(cls: type[WardenError], args: tuple[Any, ...]) -> WardenError:
    return cls.__new__(cls, *args)


def _declared_fields(cls: type[WardenError]) -> dict[str, str]:
    declared = {
        name: annotation if isinstance(annotation, str) else getattr(annotation, "__name__", str(annotation))
        for name, annotation in cls.__annotations__.items()
    }
    fields = {name: kind for name, kind in declared.items() if not kind.startswith("ClassVar")}
    taken = sorted(set(fields) & {*dir(WardenError), *_CONTEXT, "earlier_causes", "details"})
    if taken:
        raise TypeError(f"{cls.__qualname__}: every error already has {', '.join(taken)}; name the detail otherwise")
    return fields
