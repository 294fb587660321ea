"""Which torch operations a QuantizedTensor has an answer to."""

from collections.abc import Callable
from typing import Any, TypeVar

Handler = TypeVar("Handler", bound=Callable[..., Any])

HANDLERS: dict[Any, Callable[..., Any]] = {}
"""Operator overload -> function with the operator's arguments."""

ALIASING: set[Any] = set()
"""Operators whose result shares memory with an argument; torch has to be told."""


def implements(*ops: Any, aliasing: bool = False) -> Callable[[Handler], Handler]:
    """Register a function as the answer to ``ops`` (operator overloads)."""

    def register(handler: Handler) -> Handler:
        for op in ops:
            HANDLERS[op] = handler
            if aliasing:
                ALIASING.add(op)
        return handler

    return register


def unsupported(what: str, way_out: str = "call .dequantize() and use the dense tensor") -> Any:
    """Raise NotImplementedError that names the operation and the way out."""
    raise NotImplementedError(f"QuantizedTensor does not support {what}; {way_out}")
