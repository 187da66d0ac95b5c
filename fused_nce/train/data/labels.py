"""One rule for labels: text without blanks around it, integers as integers, names by a classes file.

The numbers of classes follow the training split, for every split.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from fused_nce.train.data.members import Samples
from fused_nce.train.files import printable

INTEGER = re.compile(r"[+-]?[0-9]{1,18}")
CLASSES_FILE = "classes.json"
MAX_CLASSES = 1_000_000  # a larger number is no class, and a list of so many names would fill the memory


def of_folder(name: str) -> str:
    """The class that a folder's name means: the same text however a file system writes its accents."""
    return printable(unicodedata.normalize("NFC", name))


def of_text(text: str) -> str:
    """A label: `7` for ` 07` with a line end, nothing for −1.

    Raises:
        ValueError: for no text, or several lines of it.
    """
    text = unicodedata.normalize("NFC", text.strip())
    if not text or len(text.splitlines()) > 1:
        raise ValueError(f"must hold one integer or one name, got {text[:40]!r}")
    if not INTEGER.fullmatch(text):
        return printable(text)
    return "" if int(text) == -1 else str(int(text))


def of_value(value: object) -> str | None:
    """A label of a JSON field, nothing for −1; None for what is none.

    A string stays as it is: a speaker "007" is not the seventh.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if value == -1:
        return ""
    return printable(unicodedata.normalize("NFC", str(value).strip())) if isinstance(value, str | int) else None


def read_names(folder: Path) -> list[str] | None:
    """The names of a classes file beside shards, in the order of their numbers; None without one.

    Raises:
        ValueError: for a file that is no JSON list of different names.
    """
    path = folder / CLASSES_FILE
    if not path.is_file():
        return None
    try:
        names = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"data: {path} cannot be read: {error}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"data: {path} must hold a list of names, got {json.dumps(names)[:60]}")
    names = [of_folder(name.strip()) for name in names]
    if twice := [name for name in names if names.count(name) > 1][:1] if len(set(names)) < len(names) else []:
        raise ValueError(f"data: {path} must hold different names, got {twice[0]!r} twice")
    return names


class Classes:
    """The classes of a training split, by number.

    Without a classes file integers stay what they are, and other labels are numbered in the order of their names.

    Attributes:
        names: by number.
        seen: numbers that a sample of the split has.

    Raises:
        ValueError: naming the sample, for a label that is neither a number nor a name of the classes.
    """

    def __init__(self, samples: Samples) -> None:
        known = dict.fromkeys(text for text in samples.texts if text)
        self.numbered, self.file = samples.numbered, samples.class_names is not None
        integers = [int(text) for text in known if self.numbered and INTEGER.fullmatch(text)]
        if integers and not 0 <= min(integers) <= max(integers) < MAX_CLASSES:
            wrong = str(min(integers) if min(integers) < 0 else max(integers))
            raise ValueError(f"data: {where(samples, wrong)} holds {wrong}; a class must be in [0, {MAX_CLASSES:,})")
        if samples.class_names is not None:
            self.names = samples.class_names
        elif len(integers) == len(known) and self.numbered:
            self.names = [str(i) for i in range(max(integers, default=-1) + 1)]
        elif integers:
            name = next(text for text in known if not INTEGER.fullmatch(text))
            raise ValueError(
                f"data: {where(samples, name)} holds {name!r} and {where(samples, str(integers[0]))} {integers[0]}; "
                f"labels must be all numbers or all names, or have a {CLASSES_FILE} beside the shards"
            )
        else:
            self.numbered, self.names = False, sorted(known)
        self.index = {name: i for i, name in enumerate(self.names)}
        self.seen = {n for text in known if (n := self.number(samples, text)) is not None}

    def number(self, samples: Samples, text: str) -> int | None:
        """Of a label; None for one that training cannot have.

        Raises:
            ValueError: naming the sample, for a label that the classes file lacks.
        """
        if self.numbered and INTEGER.fullmatch(text):
            found = int(text) if 0 <= int(text) < len(self.names) else None
        else:
            found = self.index.get(text)
        if found is None and self.file:
            raise ValueError(
                f"data: {where(samples, text)} holds {text}, but {CLASSES_FILE} names {len(self.names)} classes: "
                f"{', '.join(self.names[:5])}{', …' if len(self.names) > 5 else ''}"
            )
        return found

    def numbers(self, samples: Samples, *, leave_out_unseen: bool) -> list[int]:
        """Of every sample, −1 where it has no label.

        Args:
            samples: of any split; those of unseen classes are removed where that is asked for.
            leave_out_unseen: do not refuse classes that no sample of the training split has.

        Raises:
            ValueError: naming the first such class.
        """
        number = {text: self.number(samples, text) for text in dict.fromkeys(samples.texts) if text}
        unseen = {text for text, found in number.items() if found not in self.seen}
        rows = [i for i, text in enumerate(samples.texts) if text in unseen]
        if unseen:
            shown = sorted(text if (n := number[text]) is None else self.names[n] for text in unseen)
            if not leave_out_unseen:
                refuse_unseen(samples.kind, "class", shown, len(rows), samples.name(rows[0]))
            samples.account.leave_out(f"{samples.kind} of classes that training lacks", shown[0], len(rows))
            samples.keep([i for i, text in enumerate(samples.texts) if text not in unseen])
        known = {text: found for text, found in number.items() if found is not None}
        return [known.get(text, -1) for text in samples.texts]


def refuse_unseen(kind: str, label: str, unseen: Sequence[str], count: int, first: str) -> NoReturn:
    """The refusal of classes that no training sample has."""
    others = f" and {len(unseen) - 1} more such" if len(unseen) > 1 else ""
    raise ValueError(
        f"data: no training {kind[:-1]} has {label} {unseen[0]!r}{others}, which {count} test {kind} have, the first "
        f"{printable(first)}; add some to the training split, or leave these out by --leave_out_unseen true"
    )


def where(samples: Samples, text: str) -> str:
    """Where a label is written first."""
    return samples.label_name(samples.texts.index(text))
