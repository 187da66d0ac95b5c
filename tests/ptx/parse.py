"""PTX text to kernels: parameters, shared memory, and a list of instructions with their operands."""

from __future__ import annotations

import re
import struct
from typing import NamedTuple

BYTES = {"pred": 1, **{f"{kind}{bits}": bits // 8 for kind in "bus" for bits in (8, 16, 32, 64)}}
BYTES |= {"f16": 2, "bf16": 2, "f32": 4, "f64": 8, "f16x2": 4, "bf16x2": 4, "tf32": 4}


class Fault(Exception):
    """What no kernel may do, or what the interpreter does not know."""


class Register(NamedTuple):
    """One of a thread's registers; `type` is that of its declaration, the place is among its kernel's."""

    place: int
    type: str


class Immediate(NamedTuple):
    """A number in the text: an integer, an address, or a float by its bits."""

    bits: int
    type: str  # "f32" and "f64" where the text says so, else ""


class Special(NamedTuple):
    """`%tid.x` and its like."""

    name: str


class Address(NamedTuple):
    """[base + offset], in bytes."""

    base: Register | Immediate
    offset: int


class Parameter(NamedTuple):
    """Where an argument lies in the launch's bytes."""

    offset: int
    size: int


Operand = Register | Immediate | Special | Address | list["Operand"]  # a list is {a, b}, and d|p
NOWHERE = Immediate(0, "_")  # a result that nobody wants


class Instruction(NamedTuple):
    """`@guard name.flags operands`: "fma.rn.ftz.f32" is ("fma", ("rn", "ftz", "f32"))."""

    name: str
    flags: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | None
    negated: bool
    text: str

    @property
    def type(self) -> str:
        """The last flag that is a type; most instructions have one."""
        return next(flag for flag in reversed(self.flags) if flag in BYTES)


class Kernel:
    """One `.entry`."""

    def __init__(self, name: str, parameters: str, body: str, dynamic: list[str]) -> None:
        self.name = name
        self.parameters: dict[str, Parameter] = {}
        self.parameter_bytes = 0
        for text in split(parameters):
            self._parameter(text)
        self.symbols = {name: p.offset for name, p in self.parameters.items()}
        self.shared_bytes = 0
        for align, symbol, size in re.findall(r"\.shared\s+\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", body):
            self.symbols[symbol] = -(-self.shared_bytes // int(align)) * int(align)
            self.shared_bytes = self.symbols[symbol] + int(size)
        self.symbols |= dict.fromkeys(dynamic, self.shared_bytes)
        self.types: dict[str, str] = {}
        for declared, names in re.findall(r"\.reg\s+\.(\w+)\s+([^;]+);", body):
            self.types |= {part.strip().partition("<")[0]: declared for part in names.split(",")}
        self.indices: dict[str, int] = {}
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for statement in statements(body):
            self._statement(statement)

    def _parameter(self, text: str) -> None:
        array = re.search(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", text)
        if array:
            align, name, size = int(array[1]), array[2], int(array[3])
        else:
            name = text.split()[-1]
            align = size = BYTES[text.split()[1].lstrip(".")]
        offset = -(-self.parameter_bytes // align) * align
        self.parameters[name] = Parameter(offset, size)
        self.parameter_bytes = offset + size

    def _statement(self, text: str) -> None:
        while label := re.match(r"([\w$]+):(?!:)\s*", text):
            self.labels[label[1]] = len(self.code)
            text = text[label.end() :]
        if not text:
            return
        head = re.match(r"(?:@(!?)([%\w]+)\s+)?([\w.:]+)\s*(.*)$", text)
        if head is None:
            raise Fault(f"no instruction: {text}")
        name, *flags = head[3].replace("::", "_").split(".")
        branch = name == "bra"
        operands = () if branch else tuple(self._operand(x) for x in split(head[4]))
        guard = self._operand(head[2]) if head[2] else None
        if not (guard is None or isinstance(guard, Register)):
            raise Fault(f"no register: {head[2]}")
        self.code.append(Instruction(name, tuple(flags), operands, guard, head[1] == "!", text))

    def target(self, branch: Instruction) -> int:
        """Where a branch goes to."""
        return self.labels[branch.text.split()[-1]]

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return [self._operand(x) for x in split(text[1:-1])]
        if text.startswith("["):
            base, _, offset = text[1:-1].replace(" ", "").partition("+")
            place = self._operand(base)
            if not isinstance(place, Register | Immediate):
                raise Fault(f"no address: {text}")
            return Address(place, int(offset or "0", 0))
        if "|" in text:
            return [self._operand(x.strip()) for x in text.split("|")]
        if text == "_":
            return NOWHERE
        if text in self.symbols:
            return Immediate(self.symbols[text], "")
        if (declared := self.types.get(text) or self.types.get(re.sub(r"\d+$", "", text))) is not None:
            return Register(self.indices.setdefault(text, len(self.indices)), declared)
        if text.startswith("%"):
            return Special(text)
        if text[:2] in ("0f", "0d"):
            return Immediate(int(text[2:], 16), "f32" if text[1] == "f" else "f64")
        if re.fullmatch(r"-?\d+\.\d+", text):
            return Immediate(struct.unpack("<Q", struct.pack("<d", float(text)))[0], "f64")
        return Immediate(int(text.rstrip("U"), 0), "")


def split(text: str) -> list[str]:
    """At the commas that are in no bracket."""
    return [part.strip() for part in re.findall(r"(?:\{[^}]*\}|\[[^\]]*\]|[^,{\[])+", text) if part.strip()]


def statements(body: str) -> list[str]:
    """One line each, labels in front; without declarations and the braces of scopes."""
    body = re.sub(r"^\s*\.(loc|file|section)[^\n]*$", "", body, flags=re.MULTILINE)
    body = re.sub(r"^(\s*[\w$]+:)(?!:)", r"\1", body, flags=re.MULTILINE)
    found = []
    for text in body.split(";"):
        # A brace that opens a scope stands at a line's start; one of operands follows an instruction.
        line = " ".join(re.sub(r"^[\s{}]+", "", text).split())
        labels = ""
        while label := re.match(r"([\w$]+:(?!:))\s*", line):
            labels, line = labels + label[1] + " ", re.sub(r"^[\s{}]+", "", line[label.end() :])
        if line.startswith((".reg", ".shared", ".pragma", ".local")):
            if line.startswith(".local"):
                raise Fault("the stack is not interpreted")
            line = ""
        if labels or line:
            found.append(labels + line)
    return found


class Module:
    """A file's kernels, each taken apart when it is first asked for."""

    def __init__(self, text: str) -> None:
        self.text = re.sub(r"//[^\n]*", "", text)
        self.dynamic = re.findall(r"\.extern\s+\.shared[^;]*?\.b8\s+([\w$]+)\[\]", self.text)
        heads = re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)\s*([^{;]*)\{", self.text, re.DOTALL)
        self.heads = {head[1]: head for head in heads}
        self.parsed: dict[str, Kernel] = {}

    def __getitem__(self, name: str) -> Kernel:
        if name not in self.parsed:
            head, depth = self.heads[name], 1
            for brace in re.compile(r"[{}]").finditer(self.text, head.end()):
                depth += 1 if brace[0] == "{" else -1
                if not depth:
                    break
            body = self.text[head.end() : brace.start()]
            self.parsed[name] = Kernel(name, head[2], body, self.dynamic)
        return self.parsed[name]
