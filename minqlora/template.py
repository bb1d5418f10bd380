"""Chapter 14. Chat templates: programs of strangers, run in a sandbox.

A chat template is a small Jinja program that comes with a model and writes a conversation the way the model
saw conversations in training::

    {% for m in messages %}<|im_start|>{{ m.role }}\\n{{ m.content }}<|im_end|>\\n{% endfor %}

    [{"role": "user", "content": "Hi"}]   ->   <|im_start|>user\\nHi<|im_end|>\\n

Somebody else wrote it, so it runs where it can read what it is given and nothing else, has some seconds, and
can make no value larger than a conversation could be.

Cost: about a tenth of a millisecond for a conversation; a template is compiled once.

Source: Jinja's own sandbox, which bounds reach but neither time nor size.

Before: adapter. Next: tokenizer.
"""

import json
import math
import operator
import re
import time
import traceback
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import wraps
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.runtime import LoopContext
from jinja2.sandbox import MAX_RANGE, ImmutableSandboxedEnvironment, SecurityError
from jinja2.utils import Namespace

# What a template may take: a conversation of a million tokens has some four million characters.
MAX_SECONDS = 10
MAX_SIZE = 10_000_000

_TEMPLATE = "<template>"  # what Jinja calls the file of a template that has none


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Jinja with what chat templates may use, and bounds on what they may take.

    Jinja's sandbox keeps a template from Python's internals and from changing its input. It does not keep it
    from running forever or from filling the memory, and a few characters are enough for either. So the clock
    is looked at wherever time could pass; and no value may grow beyond MAX_SIZE: it is measured, with all
    that it holds, where it gets a name, is handed on or is written, and the few operations that make much
    out of little are asked beforehand how much.
    """

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self) -> None:
        self._deadline = math.inf
        self._compiled: dict[str, jinja2.Template] = {}
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            finalize=self._measured,
            extensions=["jinja2.ext.loopcontrols", _GenerationBlock],
        )
        del self.globals["lipsum"], self.filters["urlize"]
        self.globals |= {
            "namespace": _TemplateNamespace,
            "raise_exception": _raise_template_error,
            "strftime_now": lambda text: datetime.now().strftime(text),
        }
        self.filters["tojson"] = _to_json
        self.filters = {name: self._bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"_turns": self._turns, "_measured": self._measured}

    def write(self, source: str, variables: dict[str, Any]) -> str:
        """Return what a template writes. Whatever goes wrong in it is raised, of any type."""
        if source not in self._compiled:
            self._compiled[source] = self.from_string(self._watched(self.parse(source)))
        self._deadline = time.monotonic() + MAX_SECONDS
        try:
            return self._compiled[source].render(variables)
        finally:
            self._deadline = math.inf

    def _watched(self, tree: nodes.Template) -> nodes.Template:
        # The program, with a filter around each value that is looped over, tested, named or joined by `~`.
        for node in tree.find_all((nodes.For, nodes.If, nodes.Assign, nodes.With, nodes.Concat)):
            match node:
                case nodes.For():
                    node.iter = _filtered("_turns", node.iter)
                case nodes.If():
                    node.test = _filtered("_measured", node.test)
                case nodes.Assign():
                    node.node = _filtered("_measured", node.node)
                case nodes.With():
                    node.values = [_filtered("_measured", value) for value in node.values]
                case nodes.Concat():
                    node.nodes = [_filtered("join", nodes.List(node.nodes, lineno=node.lineno))]
        return tree

    def _look_at_the_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise SecurityError(f"it ran for more than {MAX_SECONDS} seconds")

    def _turns(self, values: Iterable[Any]) -> Iterator[Any]:
        for value in values:
            self._look_at_the_clock()
            yield value

    def _measured(self, value: Any) -> Any:
        # What an iterator yields can be measured only as it comes.
        self._look_at_the_clock()
        if isinstance(value, Iterator) and not isinstance(value, LoopContext):
            return self._metered(value)
        _require_modest(_size(value))
        return value

    def _metered(self, values: Iterator[Any]) -> Iterator[Any]:
        size = 0
        for value in self._turns(values):
            size += _size(value)
            _require_modest(size)
            yield value

    def concat(self, texts: Iterable[str]) -> str:
        """Join what a template, a macro or a block has written."""
        return "".join(self._metered(iter(texts)))

    def unsafe_undefined(self, obj: Any, attribute: str) -> Any:
        """Refuse at once what Jinja would leave undefined until it is used."""
        raise SecurityError(f"it reaches for {attribute!r} of a value of type {type(obj).__name__}")

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        """Call a function or a method; the names are Jinja's, out of the way of a keyword's."""
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja has its own str.format
        name, receiver = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        _require_modest(_amount(name, receiver, [*args, *kwargs.values()]))
        args = tuple(map(__self._measured, args))
        kwargs = {key: __self._measured(value) for key, value in kwargs.items()}
        return super().call(__context, __obj, *args, **kwargs)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Compute `left operator right`."""
        _require_modest(_amount(operator, left, [right]))
        return super().call_binop(context, operator, left, right)

    def _bounded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        # A filter that measures what it is given. Some want an argument of Jinja's before the value.
        first = 1 if hasattr(function, "jinja_pass_arg") else 0

        @wraps(function)
        def bounded(*args: Any, **kwargs: Any) -> Any:
            given = [self._measured(value) for value in args[first:]]
            if given:
                _require_modest(_amount(name, given[0], [*given[1:], *kwargs.values()]))
            return function(*args[:first], *given, **kwargs)

        return bounded


def _filtered(name: str, value: Any) -> nodes.Expr:
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno)


def _require_modest(size: int) -> None:
    if size > MAX_SIZE:
        raise SecurityError(f"it makes a value of more than {MAX_SIZE:,} characters")


def _size(value: Any) -> int:
    # Characters of a value and of all that it holds, as often as it holds it: some ten for an item, and those
    # of a text. Nobody counts on beyond what is too much.
    if type(value) is str:  # what almost all are
        return 10 + len(value)
    size, left = 0, [value]
    while left and size <= MAX_SIZE:
        part = left.pop()
        size += 10
        if isinstance(part, str | bytes):
            size += len(part)
        elif isinstance(part, range):
            size += 10 * len(part)
        elif isinstance(part, int):
            size += part.bit_length() // 3
        elif isinstance(part, Mapping):
            left += part.keys()
            left += part.values()
        elif isinstance(part, Collection):
            left += part
    return size


# Operations that write a value once for each column, place or character they are told.
_MULTIPLIERS = {"*", "center", "ljust", "rjust", "zfill", "expandtabs", "indent", "wordwrap", "translate"}
_MULTIPLIERS |= {"batch", "slice", "tojson", "round", "to_bytes"}


def _amount(operation: str, value: Any, others: Sequence[Any]) -> int:
    # No less than the size of what a filter, a method or an operator is about to make.
    size, sizes = _size(value), list(map(_size, others))
    if operation == "+":
        return size + sum(sizes)
    numbers = [abs(other) for other in (value, *others) if isinstance(other, int)]
    if operation in _MULTIPLIERS:
        return size * max(sizes + numbers, default=1)
    if operation == "**":
        return size * max(numbers, default=1)
    if operation == "sum" and any(isinstance(other, list | tuple) for other in others):
        return size * size
    if operation == "join":
        lengths = [operator.length_hint(other, MAX_RANGE) for other in (value, *others[:1])]
        return size + sum(sizes) + (math.prod(lengths) if others else 0)
    if operation == "replace" and len(others) > 1:
        return size + str(value).count(str(others[0])) * sizes[1]
    if operation in ("%", "format", "format_map") and isinstance(value, str):
        widths = [int(width) for width in re.findall(r"\d+", value)]
        if re.search(r"%[^a-zA-Z%]*\*|\{[^{}]*\{", value):  # a width that an argument decides
            return MAX_SIZE + 1
        return size + (value.count("%") + value.count("{")) * (sum(sizes) + max(widths, default=0))
    return size + sum(sizes)


class _TemplateNamespace(Namespace):
    # What a template may write into: only names that Python has no use for, and nothing to see from outside.
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        for name, value in dict(*args, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a name in a namespace may not begin with an underscore: {name!r}")
        super().__setitem__(name, value)

    def __repr__(self) -> str:
        return "<Namespace>"


class _GenerationBlock(Extension):
    # {% generation %} marks answers in some templates; data.py finds them itself, and the text just passes.
    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own tojson escapes for HTML and for ASCII; models were trained on neither.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_template_error(message: str) -> None:
    raise jinja2.TemplateError(message)


def template_error(error: Exception) -> str:
    """Return what went wrong in a template in one line, with its line: a syntax error knows it, others left a
    frame."""
    text = " ".join((getattr(error, "message", None) or str(error)).split()) or type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == _TEMPLATE]
    line = getattr(error, "lineno", None) or (lines[-1] if lines else None)
    return text if line is None else f"{text} (line {line} of the template)"
