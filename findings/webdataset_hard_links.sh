#!/usr/bin/env bash
# webdataset 1.0.2 drops hard-linked members of a shard in silence: GNU tar writes the second of two files that share an
# inode as a link, and that sample's image is gone, its label stays, no warning. Python's tarfile reads both.
# Seen: tarfile reads a.png and b.png with equal bytes; webdataset gives {'a': ['cls', 'png'], 'b': ['cls']}.
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet webdataset==1.0.2 numpy==2.2.6 2>/dev/null
cd "$work"
mkdir set && printf pixels > set/a.png && ln set/a.png set/b.png && printf 0 > set/a.cls && printf 1 > set/b.cls
tar -C set -cf shard.tar a.png a.cls b.png b.cls
"$work/env/bin/python" - <<'P'
import tarfile
from importlib.metadata import version

import webdataset

with tarfile.open("shard.tar") as tar:
    whole = {m.name: tar.extractfile(m).read() for m in tar}
found = {s["__key__"]: sorted(k for k in s if k[0] != "_") for s in webdataset.WebDataset("shard.tar", shardshuffle=False)}
print("webdataset", version("webdataset"), "gives", found, "of", sorted(whole))
assert whole["a.png"] == whole["b.png"] == b"pixels"
assert found == {"a": ["cls", "png"], "b": ["cls"]}, "the behaviour has changed"
P
