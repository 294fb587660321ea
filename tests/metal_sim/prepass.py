"""The token pass that turns preprocessed Metal source into C++.

A kernel file stays as it is; what C++ cannot read is rewritten token by token and lines keep their
numbers, so a diagnostic names the line of the .metal file:

* address spaces are erased (``lint`` keeps them, as OpenCL's), ``[[attributes]]`` too;
* ``threadgroup T x[N];`` in a kernel becomes memory of the engine, one slot a variable;
* ``float4(a, b)`` becomes ``metal::msl_make<float4>(a, b)``;
* every ``[[host_name]]`` instantiation becomes an entry of the table that the engine reads.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"(?P<line>^[ \t]*\#[^\n]*$)|(?P<space>\s+)|(?P<comment>//[^\n]*|/\*.*?\*/)"
    r'|(?P<string>"(?:\\.|[^"\\])*"|\'(?:\\.|[^\'\\])*\')'
    r"|(?P<number>\.?\d(?:[eEpP][+-]|[\w.])*)|(?P<name>[A-Za-z_]\w*)"
    r"|(?P<mark>::|->|<<=|>>=|\+\+|--|&&|\|\||<<|[-+*/%&|^<>=!]=|[^\s\w])",
    re.MULTILINE | re.DOTALL,
)
INTEGERS = ("char", "uchar", "short", "ushort", "int", "uint", "long", "ulong")
SCALARS = (*INTEGERS, "half", "bfloat", "float")
VECTORS = {f"{scalar}{n}" for scalar in SCALARS for n in (2, 3, 4)}
SPACES = {
    "device": "__global",
    "constant": "__constant",
    "threadgroup": "__local",
    "thread": "__private",
}
THREAD_ATTRIBUTES = (
    "thread_position_in_grid",
    "threadgroup_position_in_grid",
    "thread_position_in_threadgroup",
    "threads_per_threadgroup",
    "threadgroups_per_grid",
    "threads_per_grid",
    "thread_index_in_threadgroup",
    "thread_index_in_simdgroup",
    "simdgroup_index_in_threadgroup",
    "simdgroups_per_threadgroup",
)


class PrepassError(ValueError):
    """Metal source that the pass does not understand, with the reason."""


@dataclass
class Token:
    kind: str
    text: str


@dataclass
class KernelTemplate:
    """A kernel definition: what each parameter is bound to."""

    name: str
    bindings: list[tuple[str, str]]  # ("buffer", "3") or ("attribute", "threads_per_grid")
    max_threads: str = "1024"
    is_template: bool = False


@dataclass
class Result:
    """Rewritten source and what was found in it."""

    source: str
    kernels: dict[str, KernelTemplate] = field(default_factory=dict)
    instances: list[tuple[str, str, str]] = field(default_factory=list)  # host name, kernel, id


class Prepass:
    """One pass over one preprocessed source; ``mode`` is "run", "lint" or "cuda"."""

    def __init__(self, source: str, mode: str = "run") -> None:
        self.tokens = [Token(str(m.lastgroup), m.group()) for m in TOKEN.finditer(source)]
        self.mode = mode
        self.vectors = set(VECTORS)
        self.result = Result("")

    # ---- walking -------------------------------------------------------------------------------
    def next(self, i: int) -> int:
        """Index of the next token that means something."""
        i += 1
        while i < len(self.tokens) and self.tokens[i].kind in ("space", "line", "comment"):
            i += 1
        return i

    def text(self, i: int) -> str:
        return self.tokens[i].text if i < len(self.tokens) else ""

    def joined(self, begin: int, end: int) -> str:
        return "".join(t.text for t in self.tokens[begin:end] if t.kind not in ("line", "comment"))

    def closing(self, i: int, opening: str, closing: str) -> int:
        """Index of the token that closes the one at ``i``."""
        depth = 0
        while i < len(self.tokens):
            text = self.text(i)
            if text == opening:
                depth += 1
            elif text == closing:
                depth -= 1
            elif text == ">>" and closing == ">":
                depth -= 2
            if depth <= 0 and text in (closing, ">>"):
                return i
            i = self.next(i)
        raise PrepassError(f"no {closing!r} for {opening!r}")

    def is_attribute(self, i: int) -> bool:
        return self.text(i) == "[" and i + 1 < len(self.tokens) and self.text(i + 1) == "["

    def attribute_end(self, i: int) -> int:
        return self.closing(i, "[", "]")

    # ---- finding kernels -----------------------------------------------------------------------
    def parameters(self, left: int, right: int) -> list[str]:
        """The attribute text of each parameter between two parentheses."""
        found: list[str] = []
        current, depth, i = "", 0, self.next(left)
        if i == right:
            return []
        while i < right:
            text = self.text(i)
            if self.is_attribute(i):
                end = self.attribute_end(i)
                current += self.joined(i, end + 1)
                i = self.next(end)
                continue
            if text in "([{<":
                depth += 1
            elif text in ")]}>":
                depth -= 1
            elif text == "," and depth == 0:
                found.append(current)
                current = ""
            i = self.next(i)
        return [*found, current]

    def binding(self, kernel: str, position: int, attributes: str) -> tuple[str, str]:
        match = re.search(r"\bbuffer\s*\(\s*(\d+)\s*\)", attributes)
        if match:
            return ("buffer", match.group(1))
        for name in THREAD_ATTRIBUTES:
            if re.search(rf"\b{name}\b", attributes):
                return ("attribute", name)
        raise PrepassError(
            f"kernel {kernel}: parameter {position} needs [[buffer(n)]] or a known thread "
            f"attribute, got {attributes or 'none'}"
        )

    def find(self) -> None:
        """Kernels, explicit instantiations and typedefs of vectors."""
        i = -1
        while (i := self.next(i)) < len(self.tokens):
            text = self.text(i)
            if text == "typedef" and self.text(self.next(i)) == "vec":
                close = self.closing(self.next(self.next(i)), "<", ">")
                self.vectors.add(self.text(self.next(close)))
            elif text == "template" and self.text(self.next(i)) != "<":
                i = self.instance(i)
            elif text == "kernel" or (
                self.is_attribute(i)
                and "kernel" in re.findall(r"\w+", self.joined(i, self.attribute_end(i)))
            ):
                i = self.definition(i)

    def instance(self, i: int) -> int:
        """template [[host_name("x")]] [[kernel]] decltype(f<A>) f<A>;"""
        host = None
        j = self.next(i)
        while self.is_attribute(j):
            end = self.attribute_end(j)
            match = re.search(r'host_name\s*\(\s*"([^"]*)"', self.joined(j, end))
            host = match.group(1) if match else host
            j = self.next(end)
        if self.text(j) == "decltype":
            j = self.next(self.closing(self.next(j), "(", ")"))
            name, begin = self.text(j), j
            while self.text(j) != ";":
                j = self.next(j)
            if host is None:
                raise PrepassError(f"instantiation of {name} has no host_name")
            self.result.instances.append((host, name, self.joined(begin, j).strip()))
            return j
        raise PrepassError("an explicit instantiation must be written with decltype")

    def definition(self, i: int) -> int:
        attributes = ""
        j = i
        while True:
            if self.is_attribute(j):
                end = self.attribute_end(j)
                attributes += self.joined(j, end)
                j = self.next(end)
            elif self.text(j) in ("kernel", "void"):
                j = self.next(j)
            else:
                break
        name = self.text(j)
        left = self.next(j)
        if self.text(left) != "(":
            raise PrepassError(f"expected the parameters of kernel {name!r}")
        right = self.closing(left, "(", ")")
        back = i - 1
        while back >= 0 and self.text(back) not in (";", "}"):
            back -= 1
        template = any(t.text == "template" for t in self.tokens[back + 1 : i])
        kernel = KernelTemplate(
            name,
            [
                self.binding(name, n, attribute)
                for n, attribute in enumerate(self.parameters(left, right))
            ],
            is_template=template,
        )
        match = re.search(r"max_total_threads_per_threadgroup\s*\((.*)\)", attributes)
        if match:
            kernel.max_threads = match.group(1)
        self.result.kernels[name] = kernel
        if not template:
            self.result.instances.append((name, name, name))
        return right

    # ---- rewriting -----------------------------------------------------------------------------
    def slot(self, i: int) -> tuple[str, int] | None:
        """``threadgroup T x[N];`` at ``i`` as engine memory; None for a pointer or parameter."""
        end = i
        while self.text(end) not in (";", ")", "{", "=", ""):
            if self.text(end) in ("*", "&"):
                return None
            if self.text(end) == "[":
                end = self.closing(end, "[", "]")
            end = self.next(end)
        if self.text(end) != ";":
            raise PrepassError("threadgroup variables take no initializer")
        declaration = self.joined(self.next(i), end)
        match = re.fullmatch(r"\s*([^\[]*[\s>])(\w+)\s*((?:\[.*\])*)\s*", declaration, re.DOTALL)
        if match is None or "," in re.sub(r"<.*?>", "", match.group(1)):
            raise PrepassError(f"one threadgroup variable a declaration, got {declaration!r}")
        base, name, extent = match.groups()
        kind = f"msl_type_{name}"
        if self.mode == "lint":
            # OpenCL wants local variables in kernels only, and templates are none there.
            return (
                f"typedef {base}{kind}{extent}; __local {kind}& {name} = *(__local {kind}*)0",
                end,
            )
        if self.mode == "cuda":
            return f"__shared__ {base}{name}{extent}", end
        return (
            f"typedef {base}{kind}{extent}; "
            f'static const msl::Slot msl_slot_{name} = {{"{name}", sizeof({kind})}}; '
            f"{kind}& {name} = *static_cast<{kind}*>(msl_threadgroup_slot(&msl_slot_{name}))",
            end,
        )

    def run(self) -> Result:
        """The rewritten source."""
        self.find()
        out: list[str] = []
        previous, braces, i = ";", 0, 0
        while i < len(self.tokens):
            token = self.tokens[i]
            text = token.text
            if token.kind in ("space", "line", "comment"):
                out.append(text if token.kind != "comment" else "\n" * text.count("\n"))
                i += 1
                continue
            if self.is_attribute(i):
                end = self.attribute_end(i)
                out.append("\n" * self.joined(i, end).count("\n"))
                if self.mode == "cuda" and "kernel" in re.findall(r"\w+", self.joined(i, end)):
                    out.append("__device__ inline ")
                i = end + 1
                continue
            if text == "template" and self.text(self.next(i)) != "<":
                while self.text(i) != ";":  # an instantiation: the entry table makes it
                    i += 1
                i += 1
                continue
            if text == "kernel":
                out.append("__device__ inline" if self.mode == "cuda" else "")
                i += 1
                continue
            if text == "inline" and self.mode == "cuda":
                out.append("__device__ ")
            if token.kind == "number" and text[-1] in "hH" and not text.lower().startswith("0x"):
                out.append(f"half({text[:-1]})")
            elif text == "threadgroup" and braces > 0 and previous in "{};":
                found = self.slot(i)
                if found is not None:
                    out.append(found[0])
                    previous, i = "x", found[1]
                    continue
                out.append(SPACES[text] if self.mode == "lint" else "")
            elif text in SPACES:
                if self.mode == "lint":
                    out.append(SPACES[text])
                else:
                    out.append("const" if text == "constant" else "")
            elif text in self.vectors and self.text(self.next(i)) == "(":
                out.append(f"metal::msl_make<{text}>")
            elif text == "vec" and self.text(self.next(i)) == "<":
                close = self.closing(self.next(i), "<", ">")
                if self.text(self.next(close)) == "(":
                    out.append(f"metal::msl_make<{self.joined(i, close + 1)}>")
                else:
                    out.append(self.joined(i, close + 1))
                previous, i = ">", close + 1
                continue
            else:
                braces += (text == "{") - (text == "}")
                out.append(text)
            previous = text
            i += 1
        self.result.source = "".join(out)
        return self.result


def entry_table(result: Result) -> str:
    """C++ behind the kernels: one entry a host name, with its parameters' types."""
    lines = ['# 1 "entry_table"', '#include "msl_bind.h"']
    rows = []
    for n, (host, kernel_name, identifier) in enumerate(result.instances):
        kernel = result.kernels.get(kernel_name)
        if kernel is None:
            raise PrepassError(f"{host} instantiates {kernel_name!r}, which is no kernel")
        lines.append(f"typedef msl::Signature<decltype({identifier})> msl_signature_{n};")
        arguments, params = [], []
        buffers = [int(index) for kind, index in kernel.bindings if kind == "buffer"]
        if len(set(buffers)) != len(buffers):
            raise PrepassError(f"kernel {kernel_name} binds a buffer index twice")
        if any(index > 30 for index in buffers):
            raise PrepassError(
                f"kernel {kernel_name} needs buffer indices below 31, got {max(buffers)}"
            )
        for position, (kind, where) in enumerate(kernel.bindings):
            kind_type = f"msl_signature_{n}::At<{position}>"
            if kind == "buffer":
                arguments.append(f"msl::Buffer<{kind_type}>::get(a[{where}])")
                params.append(f"msl::Buffer<{kind_type}>::describe({where})")
            else:
                arguments.append(f"msl::Attribute<{kind_type}>::get(t.{where})")
        lines.append(
            f"MSL_PLAIN static void msl_entry_{n}(void* const* a, const msl::Thread& t) "
            f"{{ (void)a; (void)t; {identifier}({', '.join(arguments)}); }}"
        )
        lines.append(f"static const msl::Param msl_params_{n}[] = {{ {', '.join(params)} }};")
        rows.append(
            f'{{"{host}", msl_entry_{n}, msl_params_{n}, {len(params)}, '
            f"msl::u32({kernel.max_threads})}}"
        )
    if not rows:
        raise PrepassError("the source instantiates no kernel")
    lines.append(f'extern "C" {{ extern const msl::Kernel msl_kernels[{len(rows)}]; ')
    lines.append(f"const msl::Kernel msl_kernels[{len(rows)}] = {{ {', '.join(rows)} }};")
    lines.append(f"extern const int msl_kernel_count; const int msl_kernel_count = {len(rows)}; }}")
    return "\n".join(lines) + "\n"


def to_cpp(preprocessed: str) -> str:
    """Preprocessed Metal source -> a C++ translation unit for the engine."""
    result = Prepass(preprocessed).run()
    return '#include "metal_stdlib"\n' + result.source + "\n" + entry_table(result)
