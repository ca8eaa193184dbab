"""The three spellings of Buffer's constructor, told apart by the type of the first positional argument.

==========================  =============================================================================================
first positional argument   order of the positional arguments
==========================  =============================================================================================
bool                        disable_ll_nvlink, explicitly_destroy, rank, low_latency_mode, group, comm, tcp_store_group,
                            timeout_ms
str                         nvlink_backend, explicitly_destroy, rank, enable_shrink, group, comm
other integer               rank, then a str is nvlink_backend and a bool explicitly_destroy
==========================  =============================================================================================
"""
import dataclasses
import inspect
import os
from typing import Any, Optional

from .errors import integer, require

DEFAULT_TIMEOUT_MS = 30_000

_BY_BOOL = ("disable_ll_nvlink", "explicitly_destroy", "rank", "low_latency_mode", "group", "comm", "tcp_store_group",
            "timeout_ms")
_BY_NAME = ("nvlink_backend", "explicitly_destroy", "rank", "enable_shrink", "group", "comm")
_KEYWORDS = {*_BY_BOOL, *_BY_NAME, "rank_id", "device", "combine"}


@dataclasses.dataclass
class Arguments:
    """The constructor's arguments, whatever the spelling."""

    disable_ll_nvlink: bool = False
    explicitly_destroy: bool = False
    rank: int = 0
    low_latency_mode: bool = True
    group: Any = None
    comm: Any = None
    tcp_store_group: Any = None
    timeout_ms: int = DEFAULT_TIMEOUT_MS
    device: Optional[str] = None
    combine: Optional[str] = None


def _shown() -> inspect.Signature:
    kinds = inspect.Parameter
    parameters = [kinds("self", kinds.POSITIONAL_OR_KEYWORD)]
    for field in dataclasses.fields(Arguments):
        kind = kinds.POSITIONAL_OR_KEYWORD if field.name in _BY_BOOL else kinds.KEYWORD_ONLY
        parameters.append(kinds(field.name, kind, default=field.default, annotation=field.type))
    return inspect.Signature(parameters)


SIGNATURE = _shown()  # of the first spelling, for programs and people that look


def parse(positional: tuple, keywords: dict) -> Arguments:
    """Arguments of one call. TypeError, ValueError, NixlEpError: names the argument, the value and what is allowed."""
    unknown = set(keywords) - _KEYWORDS
    if unknown:
        raise TypeError(f"Buffer() got unknown keyword {sorted(unknown)[0]!r}; known: {', '.join(sorted(_KEYWORDS))}")
    given = _name_positional(positional)
    for name, value in keywords.items():
        if name in given:
            raise TypeError(f"Buffer() got {name!r} both by position and by keyword")
        given[name] = value
    _merge_rank_id(given)
    given.pop("enable_shrink", None)
    backend = given.pop("nvlink_backend", None)
    if backend is not None:
        _apply_nvlink_backend(given, backend)
    given["rank"] = integer("rank", given.get("rank", 0))
    given["timeout_ms"] = integer("timeout_ms", given.get("timeout_ms", DEFAULT_TIMEOUT_MS), 64)
    arguments = Arguments(**given)
    require(arguments.group is None or arguments.comm is None, "Buffer() takes group or comm, not both")
    require(arguments.timeout_ms >= 0, f"timeout_ms is {arguments.timeout_ms}; 0 or more is allowed")
    return arguments


def _name_positional(positional: tuple) -> dict:
    if not positional:
        return {}
    first = positional[0]
    if isinstance(first, (bool, str)):
        order = _BY_BOOL if isinstance(first, bool) else _BY_NAME
        if len(positional) > len(order):
            raise TypeError(f"Buffer() takes at most {len(order)} positional arguments here, {len(positional)} were given")
        return dict(zip(order, positional))
    given = {"rank": integer("rank", first)}
    for value in positional[1:]:
        name = {str: "nvlink_backend", bool: "explicitly_destroy"}.get(type(value))
        if name is None or name in given:
            raise TypeError("Buffer(rank, ...) takes a str (nvlink_backend) and a bool (explicitly_destroy) by position; got "
                            f"{value!r}")
        given[name] = value
    return given


def _merge_rank_id(given: dict) -> None:
    rank_id = given.pop("rank_id", None)
    if rank_id is None:
        return
    if given.get("rank", rank_id) != rank_id:
        raise TypeError(f"rank is {given['rank']} and rank_id is {rank_id}; they mean the same, give one of them")
    given["rank"] = rank_id


def _apply_nvlink_backend(given: dict, backend: str) -> None:
    if backend not in ("nixl", "ipc", "none"):
        raise ValueError(f"nvlink_backend is {backend!r}; allowed: 'nixl', 'ipc', 'none'")
    if backend == "none":
        given["disable_ll_nvlink"] = True
    else:  # programs read back which one was chosen
        os.environ["NIXL_EP_NVLINK_BACKEND_IPC"] = "1" if backend == "ipc" else "0"


def choose(name: str, given: Optional[str], variable: str, default: str, allowed: dict) -> str:
    """The argument, else the environment variable, else the default; ValueError naming what is allowed."""
    value = given if given is not None else os.environ.get(variable) or default
    if value not in allowed:
        source = name if given is not None else variable
        raise ValueError(f"{source} is {value!r}; allowed: {', '.join(map(repr, allowed))}")
    return value
