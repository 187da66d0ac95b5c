"""Samples of WebDataset shards: members of a `.tar` or `.tar.gz` that share a key."""

from __future__ import annotations

import gc
import json
import os
import posixpath
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np

from fused_nce.train.data import labels
from fused_nce.train.data.members import BESIDE, FIELDS, KINDS, LABEL_SUFFIXES, Name, Samples, hidden, unread
from fused_nce.train.data.texts import Texts
from fused_nce.train.files import printable

MIN_IDS = 100  # so many samples, all with another number in `.id`: it counts them

# Where a member's bytes are: offset and number, the bytes themselves, or the member that a link leads to.
# Offsets among the contents that are held are negative: ~0, ~1 …
Place = tuple[int, int] | bytes | str


class _Member(tarfile.TarInfo):
    """Tells its archive how the reading of headers ended: `tarfile` takes a cut or broken header for the end."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> _Member:
        try:
            return super().fromtarfile(tarfile)
        except Exception as error:
            tarfile.ended = type(error).__name__
            raise


class _Sample:
    """Members of one stem."""

    __slots__ = ("beside", "main", "main_suffix", "stem")

    def __init__(self, stem: str) -> None:
        self.stem = stem
        self.main: Place | None = None
        self.main_suffix = ""
        self.beside: dict[str, Place] = {}


class ShardSamples(Samples):
    """The samples of shards.

    A plain `.tar` is indexed once and read by offset. A `.tar.gz` cannot be, so what it keeps is held in memory.

    Args:
        shards: the files.
        kind: of a sample.
        hold: keep the contents of a `.tar.gz`; without them there are names and labels alone.

    Raises:
        ValueError: naming the shard, and the member, for what cannot be read.
    """

    def __init__(self, shards: Sequence[Path], kind: str, *, hold: bool = True) -> None:
        super().__init__(kind)
        self.shards, self.hold, self.numbered = list(shards), hold, True
        self.class_names = labels.read_names(self.shards[0].parent)
        self.names, self.held = Texts(), bytearray()  # stem and suffix of each; contents that no shard gives by offset
        self.places = np.zeros((0, 3), np.int64)  # number of the shard, offset, size
        found: list[dict[str, str]] = []  # of each sample, labels by suffix
        self._same: dict[Any, Any] = {}  # what is equal in many samples is one object
        rows = array("q")
        with _uncollected():
            for number, shard in enumerate(self.shards):
                for place in self._index(shard, found):
                    rows.extend((number, *place))
        if not self.names:
            raise ValueError(f"data: no {kind[:-1]} in {', '.join(map(str, self.shards))}{self.account.aside()}")
        self.places = np.array(rows).reshape(-1, 3)
        self._let_go()
        chosen = self._choose(found)
        self.label_suffixes = [next((s for s in chosen if s in each), "") for each in found]  # of each sample
        self.texts = [each.get(suffix, "") for each, suffix in zip(found, self.label_suffixes, strict=True)]
        del self._same

    def _index(self, shard: Path, found: list[dict[str, str]]) -> Iterator[tuple[int, int]]:
        zipped = not shard.name.endswith(".tar")
        places: dict[str, Place] = {}
        members: list[tuple[Name, Place]] = []
        beside = BESIDE[self.kind]
        try:
            opened: Any = tarfile.open(shard, "r:gz" if zipped else "r:", tarinfo=_Member)  # noqa: SIM115
            with opened as tar:
                for member in tar:
                    tar.members.clear()  # of which there may be millions
                    if member.isdir():
                        continue
                    path = posixpath.normpath(member.name)
                    if hidden(path):
                        self.account.leave_out("hidden members", f"{shard}:{path}")
                        continue
                    name = Name.of(path)
                    main = name.kind == self.kind
                    read = main or name.kind in beside
                    if member.isreg():
                        place: Place = member.offset_data, member.size
                        if read and (zipped or not main or member.issparse()):
                            content = _content(tar, member) if self.hold or not main else b""
                            place = self._hold(content) if main else content
                    elif member.islnk():
                        place = posixpath.normpath(member.linkname)
                    elif member.issym():
                        place = posixpath.normpath(posixpath.join(posixpath.dirname(path), member.linkname))
                    else:
                        self.account.leave_out("members that are no file", f"{shard}:{path}")
                        continue
                    if read or not zipped:
                        places[path] = place
                    if read:
                        members.append((name, place))
                    else:
                        self.account.leave_out(unread(name, "members"), f"{shard}:{path}")
                self._check_end(shard, tar, zipped)
        except Exception as error:  # a broken archive makes tarfile and zlib raise errors of many types
            raise ValueError(f"data: shard {shard} cannot be read: {error}") from error
        for sample in self._group(shard, members):
            assert sample.main is not None
            found_at = _follow(sample.main, places)
            if found_at is None:
                what = f"{shard}:{sample.stem}.{sample.main_suffix}"
                self.account.leave_out("links to what the shard lacks", what)
                continue
            self.names.append(f"{sample.stem}.{sample.main_suffix}")
            self._read_labels(shard, sample, places, found)
            yield self._hold(found_at) if isinstance(found_at, bytes) else found_at

    def _hold(self, content: bytes) -> tuple[int, int]:
        self.held += content
        return len(content) - len(self.held) - 1, len(content)

    def _check_end(self, shard: Path, tar: Any, zipped: bool) -> None:
        ended = getattr(tar, "ended", "EOFHeaderError")
        if ended == "EmptyHeaderError":
            self.account.leave_out("end marks that are missing (a shard that may have been cut)", str(shard))
        elif ended != "EOFHeaderError":
            raise tarfile.ReadError(f"it ends inside a header, or has a broken one, at byte {tar.offset}")
        rest = 0
        while block := tar.fileobj.read(1 << 20):  # of a .tar.gz all, which checks its checksum
            rest += bool(block.strip(b"\0"))
            if rest and not zipped:
                break
        if rest:
            self.account.leave_out("archives behind the end mark of another", str(shard))

    def _group(self, shard: Path, members: list[tuple[Name, Place]]) -> list[_Sample]:
        """Members by stem. A name that comes again after others starts a second sample of its key."""
        plain = {name.key for name, _ in members if name.kind == self.kind and name.stem == name.key}
        labelled = {name.stem for name, _ in members if name.kind != self.kind}
        latest: dict[str, _Sample] = {}
        ordered: list[_Sample] = []
        bare: dict[str, list[_Sample]] = {}  # without their file so far
        before = ""
        for name, place in members:
            stem, key, suffix, kind = name
            main = kind == self.kind
            if main and stem != key and key in plain and stem not in labelled:
                self.account.leave_out(
                    f"further {self.kind} of a key", f"{shard}:{stem}.{suffix}"
                )  # 0.seg.png by 0.png
                continue
            sample = latest.get(stem)
            again = sample is not None and (sample.main_suffix == suffix if main else suffix in sample.beside)
            if sample is None or (again and before != stem):
                sample = latest[stem] = _Sample(stem)
                bare.setdefault(stem, []).append(sample)
                again = False
            before = stem
            if main and sample.main is not None:
                why = "members that come twice" if again else f"further {self.kind} of a key"
                self.account.leave_out(why, f"{shard}:{stem}.{suffix}")
            elif main:
                sample.main, sample.main_suffix = place, suffix
                ordered.append(sample)
                bare[stem].remove(sample)
            elif again:
                self._compare(f"{shard}:{stem}.{suffix}", sample.beside[suffix], place)
            else:
                sample.beside[suffix] = place
        self._inherit(shard, ordered, {stem: samples for stem, samples in bare.items() if samples})
        return ordered

    def _inherit(self, shard: Path, ordered: list[_Sample], bare: dict[str, list[_Sample]]) -> None:
        """Labels without a file of their own: of the files whose key they name, or else counted."""
        used = set[str]()
        for sample in ordered:
            key = Name.of(sample.stem + ".").key
            for source in bare.get(sample.stem, []):
                for suffix, place in source.beside.items():
                    if suffix in sample.beside:
                        self._compare(f"{shard}:{sample.stem}.{suffix}", sample.beside[suffix], place)
                    sample.beside.setdefault(suffix, place)
                used.add(sample.stem)
            if key != sample.stem and key in bare and not sample.beside:  # 0.left.png, 0.right.png and 0.cls
                sample.beside = dict(bare[key][0].beside)
                used.add(key)
        for stem, samples in bare.items():
            for sample in samples if stem not in used else []:
                suffix = next(iter(sample.beside))
                self.account.leave_out(f"labels without {self.kind}", f"{shard}:{stem}.{suffix}", len(sample.beside))

    def _compare(self, where: str, first: Place, second: Place) -> None:
        if first != second:
            raise ValueError(f"data: {printable(where)} comes twice, with {first!r:.40} and with {second!r:.40}")
        self.account.leave_out("members that come twice", where)

    def _read_labels(self, shard: Path, sample: _Sample, places: dict[str, Place], found: list[dict[str, str]]) -> None:
        texts: dict[str, str] = {}
        fields: dict[str, str] = {}
        for suffix, linked in sample.beside.items():
            where = f"{shard}:{sample.stem}.{suffix}"
            place = _follow(linked, places)
            if place is None:
                self.account.leave_out("links to what the shard lacks", where)
                continue
            content = place if isinstance(place, bytes) else self._read(shard, *place)
            try:
                if KINDS[suffix] == FIELDS:
                    fields |= self._fields(content, where)
                else:
                    texts[suffix] = labels.of_text(content.decode("utf-8-sig"))
            except ValueError as error:
                if suffix not in LABEL_SUFFIXES[1:]:
                    raise ValueError(f"data: {printable(where)} cannot be read: {error}") from error
                self.account.leave_out(f".{suffix} members that hold no integer", where)
                continue
            if suffix in LABEL_SUFFIXES[1:] and not labels.INTEGER.fullmatch(texts[suffix] or "-1"):
                del texts[suffix]
                self.account.leave_out(f".{suffix} members that hold no integer", where)
        found.append(self._shared(texts))
        self.fields.append(self._shared(fields))

    def _shared(self, texts: dict[str, str]) -> dict[str, str]:
        known = {name: self._same.setdefault(text, text) for name, text in texts.items()}
        shared: dict[str, str] = self._same.setdefault(tuple(known.items()), known)
        return shared

    def _fields(self, content: bytes, where: str) -> dict[str, str]:
        values = json.loads(content.decode("utf-8-sig"))
        if not isinstance(values, dict):
            raise ValueError(f"a .json member must hold an object, got {content[:40]!r}")
        found = {}
        for name, value in values.items():
            text = labels.of_value(value)
            if text is None:
                self.account.leave_out(f"fields {printable(name)} that hold no label", where)
            elif text:
                found[printable(name)] = text
        return found

    def _choose(self, found: list[dict[str, str]]) -> list[str]:
        """Which suffixes are the label, first choice first: none that stands beside another or counts the samples."""
        chosen: list[str] = []
        for suffix in LABEL_SUFFIXES:
            having = [i for i, each in enumerate(found) if suffix in each]
            if not having:
                continue
            beside = any(other in found[i] for i in having for other in chosen)
            ids = suffix != "cls" and len({found[i][suffix] for i in having}) == len(having) > MIN_IDS
            if beside or ids:
                why = "beside another label" if beside else "that differ in every sample"
                self.account.leave_out(f".{suffix} members {why}", f"{self.name(having[0])}.{suffix}", len(having))
            else:
                chosen.append(suffix)
        return chosen

    def place(self, index: int) -> tuple[Path, int, int]:
        """Shard, offset and bytes of a sample; a negative offset is one among the contents that are held."""
        shard, at, size = self.places[index].tolist()
        return self.shards[shard], at, size

    def name(self, index: int) -> str:
        return f"{self.place(index)[0]}:{self.names[index].rpartition('.')[0]}"

    def label_name(self, index: int) -> str:
        return f"{printable(self.name(index))}.{self.label_suffixes[index] or LABEL_SUFFIXES[0]}"

    def short_name(self, index: int) -> str:
        return f"{self.place(index)[0].name}:{self.names[index]}"

    def content(self, index: int, most: int | None = None) -> bytes:
        shard, at, size = self.place(index)
        return self._read(shard, at, size if most is None else min(size, most))

    def size(self, index: int) -> int:
        return self.place(index)[2]

    def _read(self, shard: Path, at: int, size: int) -> bytes:
        if at < 0:
            return bytes(memoryview(self.held)[~at : ~at + size])
        with shard.open("rb") as file:
            file.seek(at)
            return file.read(size)

    def runs(self) -> list[int]:
        return [len(list(same)) for _, same in groupby(self.places[:, 0].tolist())]

    def ahead(self, indices: list[int]) -> None:
        """Ask the system to read the stretch of each shard that they lie in, as a whole, into its own cache."""
        lying = (place for place in self.places[indices].tolist() if place[1] >= 0)
        for shard, same in groupby(lying, itemgetter(0)):
            stretches = [(at, at + size) for _, at, size in same]
            if hasattr(os, "posix_fadvise"):
                start, end = min(stretches)[0], max(end for _, end in stretches)
                with suppress(OSError), self.shards[shard].open("rb") as file:  # advice: reading itself will tell
                    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def keep(self, rows: list[int]) -> None:
        super().keep(rows)
        self.names, self.places = Texts(self.names[i] for i in rows), self.places[rows]
        self.label_suffixes = [self.label_suffixes[i] for i in rows]
        self._let_go()

    def _let_go(self) -> None:
        """Of the contents that are held, those that no sample has."""
        held = (self.places[:, 1] < 0).nonzero()[0].tolist()
        used = {(at, size) for _, at, size in self.places[held].tolist()}  # several may be links to one
        if sum(size for _, size in used) == len(self.held):
            return
        kept, moved = bytearray(), dict[tuple[int, int], int]()
        for at, size in sorted(used, reverse=True):  # as they lie
            moved[at, size] = ~len(kept)
            kept += memoryview(self.held)[~at : ~at + size]
        for row in held:
            _, at, size = self.places[row].tolist()
            self.places[row, 1] = moved[at, size]
        self.held = kept


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without Python's collector of cycles, which would look through all samples again and again, and find none."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def _content(tar: Any, member: tarfile.TarInfo) -> bytes:
    """Of a member whose header was read just now. Without `extractfile`, which takes as long as the header."""
    if member.issparse():
        return bytes(tar.extractfile(member).read())
    tar.fileobj.seek(member.offset_data)
    content: bytes = tar.fileobj.read(member.size)
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _follow(place: Place, places: dict[str, Place]) -> tuple[int, int] | bytes | None:
    """Through links, to where the bytes are."""
    for _ in range(len(places) + 1):
        if not isinstance(place, str):
            return place
        if place not in places:
            return None
        place = places[place]
    return None
