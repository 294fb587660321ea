"""Rules of the Metal Shading Language that a C++ compiler lets slip.

* Address spaces: the source is compiled in clang's OpenCL C++ mode, which keeps them apart, and
  every pointer and reference must name one (Metal has no default).
* Tokens Metal has not, or not in kernels: ``double``, ``new``, ``virtual``, exceptions, ...
* No static local variables, no recursion, no pointers to functions.
* C++14, the library functions of include/metal_stdlib only, and no overloads that differ by address
  space alone: the simulator's own compilation sees to those.
"""

from __future__ import annotations

import re
from pathlib import Path

from .compiler import (
    COMMON,
    HERE,
    INCLUDE,
    CompileError,
    compile_kernels,
    machine_flags,
    preprocess,
    run,
    zig,
)
from .prepass import SCALARS, SPACES, VECTORS, Prepass, to_cpp

IR_OUT = ("-S", "-emit-llvm", "-o", "-", "-")
FORBIDDEN = {
    "double": "Metal has no double",
    "new": "Metal has no heap",
    "delete": "Metal has no heap",
    "virtual": "Metal has no virtual functions",
    "try": "Metal has no exceptions",
    "throw": "Metal has no exceptions",
    "catch": "Metal has no exceptions",
    "goto": "Metal has no goto",
    "dynamic_cast": "Metal has no run-time type information",
    "typeid": "Metal has no run-time type information",
    "thread_local": "Metal has no thread_local",
    "asm": "Metal has no inline assembly",
    "union": "a union's members would hide conversions; use as_type",
}


def _line(prepass: Prepass, index: int) -> int:
    """Line of a token in the source, by the #line marks in front of it."""
    line = 1
    for token in prepass.tokens[:index]:
        mark = re.match(r"\s*#(?:line)?\s+(\d+)", token.text) if token.kind == "line" else None
        if mark:
            line = int(mark.group(1)) - 1
        line += token.text.count("\n")
    return line


def library() -> dict[str, str]:
    """Library functions that kernels may call, each with its section (msl_functions.txt)."""
    found: dict[str, str] = {}
    for line in (HERE / "msl_functions.txt").read_text().splitlines():
        if not line.startswith("#"):
            section, _, names = line.rpartition(":")
            found.update(dict.fromkeys(names.split(), section))
    return found


# What stands before a parenthesis without being called.
NO_CALLS = {"if", "for", "while", "switch", "return", "sizeof", "decltype", "defined", "operator"}
NO_CALLS |= {"buffer", "host_name", "static_assert", "alignas", *FORBIDDEN}


def unlisted_calls(p: Prepass, types: set[str]) -> list[str]:
    """Calls of functions that neither the source defines nor the list of library functions has."""
    words: list[tuple[int, str]] = []
    i = -1
    while (i := p.next(i)) < len(p.tokens):
        if p.is_attribute(i):
            i = p.attribute_end(i)
            continue
        words.append((i, p.text(i)))
    calls, defined = {}, set()
    for n, (i, text) in enumerate(words[:-1]):
        if p.tokens[i].kind != "name" or words[n + 1][1] != "(" or text in NO_CALLS:
            continue
        before = words[n - 1] if n else (i, "")
        is_type = p.tokens[before[0]].kind == "name" and before[1] not in ("return", "else", "in")
        if is_type or before[1] == ">":
            defined.add(text)  # `float f(`, `thread T f(`, or a constructor's `vec<T, 4>(`
        else:
            calls.setdefault(text, i)
    known = {*library(), *defined, *types}
    return [
        f"line {_line(p, i)}: {name} is no function of this source and not in msl_functions.txt"
        for name, i in calls.items()
        if name not in known
    ]


def token_rules(source: str) -> list[str]:
    """Broken token rules of one preprocessed source."""
    p = Prepass(source)
    problems = []
    types = {*SCALARS, *VECTORS, "bool", "void", "simdgroup_float8x8"}
    words = [(i, t.text) for i, t in enumerate(p.tokens) if t.kind == "name"]
    for position, (_, word) in enumerate(words):
        if word in ("typename", "struct") and position + 1 < len(words):
            types.add(words[position + 1][1])
        if word == "typedef":  # typedef ... NAME;
            end = words[position][0]
            while p.text(p.next(end)) not in (";", ""):
                end = p.next(end)
            types.add(p.text(end))
    problems += unlisted_calls(p, types)
    scopes: list[str] = []
    statement: list[int] = []
    i = -1
    while (i := p.next(i)) < len(p.tokens):
        text = p.text(i)
        if p.is_attribute(i):
            i = p.attribute_end(i)
            continue
        if text in FORBIDDEN:
            problems.append(f"line {_line(p, i)}: {text}: {FORBIDDEN[text]}")
        if text == "static" and "function" in scopes:
            problems.append(f"line {_line(p, i)}: a static local variable")
        if text in ("*", "&") and statement and p.text(statement[-1]) in (*types, "const"):
            # Back to where this declaration starts.
            begin = len(statement)
            depth = 0
            while begin > 0:
                before = p.text(statement[begin - 1])
                depth += (before in ")>") - (before in "(<")
                if depth < 0 or (depth == 0 and before == ","):
                    break
                begin -= 1
            declaration = [p.text(k) for k in statement[begin:]]
            if not any(word in SPACES for word in declaration):
                problems.append(
                    f"line {_line(p, i)}: '{' '.join(declaration)} {text}' names no address space"
                )
        if (
            text == "("
            and statement
            and p.text(p.next(i)) == "*"
            and p.text(statement[-1]) in types
        ):
            problems.append(f"line {_line(p, i)}: a pointer to a function")
        if text == "{":
            head = [p.text(k) for k in statement]
            kind = "type" if {"struct", "enum", "namespace"} & set(head) else "block"
            scopes.append("function" if kind == "block" and ")" in head else kind)
        if text == "}" and scopes:
            scopes.pop()
        if text in "{};":
            statement = []
        else:
            statement.append(i)
    return problems


def address_spaces(source: str) -> str:
    """What OpenCL C++ says about one preprocessed source with its instantiations; "" if nothing."""
    result = Prepass(source, "lint").run()
    instances = "".join(
        f"template decltype({identifier}) {identifier};\n"
        for _, name, identifier in result.instances
        if name != identifier
    )
    text = '#include "msl_lint.h"\n' + result.source + "\n" + instances
    command = [
        str(zig()),
        "clang",
        "-x",
        "clcpp",
        "-cl-std=CLC++2021",
        "-cl-no-stdinc",
        "-nostdinc",
    ]
    # The generic address space stays (copies of structs need it): token_rules finds unnamed ones.
    command += ["-Xclang", "-cl-ext=-cl_khr_fp64,-__opencl_c_fp64"]
    command += ["-fsyntax-only", "-Wno-everything", f"-I{INCLUDE}", "-"]
    try:
        run(command, text)
    except CompileError as error:
        return str(error)
    return ""


def recursion(source: str) -> list[str]:
    """Functions of one preprocessed source that can call themselves, from the compiler's IR."""
    flags = [f for f in COMMON if f not in ("-O2", "-g1")]
    ir = run(
        [str(zig()), "clang", *flags, "-O0", *machine_flags(), f"-I{INCLUDE}", *IR_OUT],
        to_cpp(source),
    )
    calls: dict[str, set[str]] = {}
    current = ""
    for line in ir.splitlines():
        if line.startswith("define"):
            current = re.search(r"@([\w.$]+)\(", line).group(1)  # type: ignore[union-attr]
            calls[current] = set()
        elif current and " call " in line:
            calls[current].update(re.findall(r"@([\w.$]+)\(", line))
    reach = {name: set(called) for name, called in calls.items()}
    changed = True
    while changed:
        changed = False
        for reached in reach.values():
            more = set().union(*(reach.get(name, set()) for name in reached)) - reached
            changed = changed or bool(more)
            reached |= more
    return sorted(name for name, reached in reach.items() if name in reached)


def check(source: str) -> list[str]:
    """Everything that is wrong with one flattened Metal source and its instantiations."""
    problems = []
    if "#pragma METAL fp contract(off)" not in source:
        problems.append("the source must say #pragma METAL fp contract(off)")
    preprocessed = preprocess(source)
    problems += token_rules(preprocessed)
    try:
        compile_kernels(source)
    except (CompileError, ValueError) as error:
        return [*problems, str(error)]
    message = address_spaces(preprocessed)
    problems += [message] if message else []
    return problems + [f"recursion in {name}" for name in recursion(preprocessed)]


def instantiate(source: str, instances: list[str]) -> str:
    """A source with one instantiation line for each template-id, as the host writes them."""
    lines = [
        f'template [[host_name("{name}")]] [[kernel]] decltype({i}) {i};'
        for i in instances
        for name in [re.sub(r"[^A-Za-z0-9]+", "_", i)]
    ]
    return source + "\n" + "\n".join(lines) + "\n"


def flatten(path: Path) -> str:
    """A kernel file with its headers, by the same code that embeds it in the binary."""
    import importlib.util

    script = path.parents[1] / "csrc" / "mps" / "embed_shaders.py"
    spec = importlib.util.spec_from_file_location("embed_shaders", script)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return str(module.flatten(path))
