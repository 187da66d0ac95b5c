"""`make test-upstream`: upstream's own suites, first alone, then with the adapters in place; none of them is kept here.

    python -m tests.compat.suites PACKAGES WORK [NAME ...]

PACKAGES holds upstream's packages and what their suites import; the suites are fetched into WORK, at the commits below,
and test those packages (open_clip's and solo-learn's the code that they lie beside).
A test that passes alone and not with ours must be in `DIFFERENT`, and each that is there must be one: else exit 1.
So must each adapter have been called whose original the suite calls alone: else nothing of ours was tested.
SUITES_FROM is where the repositories are, by owner and name.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 3600


class Suite(NamedTuple):
    """Where it is, and what of it is run: {} in the files' name stands for each of the parts."""

    repository: str
    commit: str
    files: str
    parts: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()


PML = "KevinMusgrave/pytorch-metric-learning", "216a792c22b0154d3d3bf008a7317edc7d677e71", "tests/{}.py"
PML_LOSSES = tuple(
    f"losses/test_{name}"
    for name in ("self_supervised_loss", "ntxent_loss", "contrastive_loss", "triplet_margin_loss", "cross_batch_memory")
)
CPU = ("TEST_DEVICE", "cpu")
SUITES = {
    "lightly": Suite(
        *("lightly-ai/lightly", "e8d317fc5a87f4387a85a35e689869039ec249ee", "tests/loss/test_{}_loss.py"),
        ("ntx_ent", "dcl"),
    ),
    "open_clip": Suite(
        *("mlfoundations/open_clip", "89fb801f1e6087880e951fc8354b8a2077b79c6d", "tests/test_{}.py"),
        ("siglip_chunked_loss", "factory_task", "task_specific_unit"),
        (("PYTHONPATH", "src"),),
    ),
    "solo-learn": Suite(
        *("vturrisi/solo-learn", "9187ea39c2c3f43c455ab06664d2b019a9802954", "tests/losses/test_{}.py"),
        ("simclr", "mocov2plus", "mocov3", "nnclr"),
    ),
    "pytorch-metric-learning": Suite(
        *PML, (*PML_LOSSES, "utils/test_distributed"), (CPU, ("TEST_DTYPES", "float32,float64"))
    ),
    "pytorch-metric-learning, 16 bits": Suite(*PML, PML_LOSSES, (CPU, ("TEST_DTYPES", "float16"))),
    "sentence-transformers": Suite(
        *("huggingface/sentence-transformers", "cad211983f36ce458e9b3360f3e11b29fc54cbd8"),
        "tests/sentence_transformer/losses/test_{}.py",
        ("gist_embed", "cached_gist_embed", "cmnrl", "cached_mnsrl", "gradcache", "matryoshka", "merged_forward"),
    ),
}
SCORES = "reads the scores off a cross entropy: none are held"
ROUNDED = "asks 16-bit losses for equality with upstream's code, which rounds each step: 1e-2 off in float16, ours 1e-4"
DIFFERENT = {  # by their names, or those after a dot; without its parameters, a test with any
    "pytorch-metric-learning, 16 bits": {
        "TestCrossBatchMemory.test_all_losses": ROUNDED,
        "TestCrossBatchMemory.test_loss": ROUNDED,
        "TestCrossBatchMemory.test_sanity_check": ROUNDED,
    },
    "sentence-transformers": {
        "test_positive_mask_protects_ce_target_column": SCORES,
        "test_relative_margin_negative_positive_score_suppresses_closer_negative": SCORES,
        "test_cmnrl_gather_across_devices_offset": "puts a function in the place of upstream's gathering",
        "test_gradcache_under_autocast": "the loss of 16-bit embeddings is float32",
    },
}


def fetch(suite: Suite, work: Path) -> Path:
    """The checkout, made where it is not there."""
    folder = work / suite.repository.replace("/", "-")
    if not (folder / ".fetched").exists():
        shutil.rmtree(folder, ignore_errors=True)
        source = f"{os.environ.get('SUITES_FROM', 'https://github.com')}/{suite.repository}"
        folder.mkdir(parents=True, exist_ok=True)
        for words in (
            "init --quiet",
            f"remote add origin {source}",
            f"fetch --quiet --depth 1 --filter=blob:none origin {suite.commit}",
            f"sparse-checkout set tests solo {dict(suite.variables).get('PYTHONPATH', '')}",  # no packages
            "checkout --quiet --force FETCH_HEAD",
        ):
            subprocess.run(["git", *words.split()], cwd=folder, check=True)
        (folder / ".fetched").touch()
    return folder


def outcomes(suite: Suite, folder: Path, packages: Path, report: Path, alone: bool) -> tuple[dict[str, bool], set[str]]:
    """Of each test that was not skipped, whether it passed; which of `ADAPTERS` were called. The log lies beside."""
    called = report.with_suffix(".called")
    variables = {"ADAPTERS_CALLED": str(called)} | {
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "UPSTREAM_ALONE": "1" if alone else "",
    }
    variables["PYTHONSAFEPATH"] = "1"  # the packages, not those of the checkout's version
    variables |= dict(suite.variables)
    path = [variables.get("PYTHONPATH"), ROOT, ROOT / "tests" / "compat", packages]
    variables["PYTHONPATH"] = os.pathsep.join(str(x) for x in path if x)
    command = [sys.executable, "-m", "pytest", "-q", "-W", "ignore", "-p", "in_place", "-p", "no:cacheprovider"]
    command += ["--tb=short", f"--junitxml={report}", *map(suite.files.format, suite.parts)]
    report.unlink(missing_ok=True)
    called.write_text("")
    with report.with_suffix(".log").open("w") as log:
        subprocess.run(
            command, cwd=folder, env=os.environ | variables, stdout=log, stderr=log, check=False, timeout=LIMIT_S
        )
    found = {}
    for case in ET.parse(report).iter("testcase"):
        kinds = {x.tag for x in case}
        if "skipped" not in kinds:
            found[f"{case.get('classname')}.{case.get('name')}"] = not kinds & {"failure", "error"}
    return found, set(called.read_text().split())


def is_named(test: str, listed: str) -> bool:
    """Whether an entry of `DIFFERENT` is this test's."""
    return any(f".{name}".endswith(f".{listed}") for name in (test, test.partition("[")[0]))


def differences(alone: dict[str, bool], ours: dict[str, bool], listed: Collection[str]) -> list[str]:
    """What is wrong: a test that passes alone only and is not listed, or one that is listed and passes with ours too.

    One that fails alone as well, as upstream's may by its random numbers, says nothing of a list.
    """
    if not any(alone.values()):
        return ["no test passes alone"]
    seen = [test for test, passed in alone.items() if passed and not ours.get(test)]
    new = [f"{test}: passes alone only" for test in seen if not any(is_named(test, x) for x in listed)]
    said = [*seen, *(test for test, passed in alone.items() if not passed)]
    return new + [f"{x}: is listed, and does not differ" for x in listed if not any(is_named(test, x) for test in said)]


def not_in_place(alone: Collection[str], ours: Collection[str]) -> list[str]:
    """What the suite calls, and did not call of ours."""
    if not alone:
        return ["calls nothing that ours replaces"]
    return [f"{name}: called alone, and never ours in its place" for name in sorted({*alone} - {*ours})]


def main(packages: str, work: str, *names: str) -> int:
    """Fetch, run, compare, print; 1 for a difference that is not listed, or a listed one that is none."""
    bad, place = 0, Path(work).resolve()
    for name in names or SUITES:
        suite, listed = SUITES[name], DIFFERENT.get(name, {})
        folder, runs = fetch(suite, place), []
        for kind in ("alone", "ours"):
            report = place / f"{name.replace(', ', '-').replace(' ', '-')}-{kind}.xml"
            runs.append(outcomes(suite, folder, Path(packages).resolve(), report, kind == "alone"))
        (alone, originals), (ours, adapters) = runs
        counts = f"of {len(alone)} tests {sum(alone.values())} pass alone, {sum(ours.values())} with ours"
        print(f"{name}: {counts}: {', '.join(sorted(adapters)) or 'none called'}", flush=True)
        for test, reason in listed.items():
            print(f"  listed: {test}: {reason}")
        wrong = differences(alone, ours, listed) + not_in_place(originals, adapters)
        bad += len(wrong)
        for line in wrong:
            print(f"  {line} ({report.with_suffix('.log')})")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
