"""The house rules that a machine can hold: who imports whom, what an import costs, that documents tell the truth."""

import ast
import contextlib
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it to 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE_LINES = 500  # "none much over 300"
CODE = (".py", ".cpp", ".h", ".inl", ".cu", ".cuh")


def project_files():
    """Every text file of the project: what is versioned, or would be."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0:
        paths = [ROOT / line for line in listing.stdout.splitlines()]
    else:  # an unpacked archive
        folders = ("fused_nce", "csrc", "tests", "bench", "docs", ".ci")
        paths = [*ROOT.glob("*"), *(path for folder in folders for path in (ROOT / folder).rglob("*"))]
    binary = (".png", ".so", ".pyc", ".gz", ".tar")
    return sorted(path for path in paths if path.is_file() and path.suffix not in binary)


FILES = project_files()
PACKAGE = [path for path in FILES if path.suffix == ".py" and path.is_relative_to(ROOT / "fused_nce")]
DOCUMENTS = [path for path in FILES if path.suffix == ".md"]


def name_of(path):
    return str(path.relative_to(ROOT))


def imports_of(path):
    """Every module that a file imports, by its full name, and whether it does so at the top level."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    parts = path.relative_to(ROOT).with_suffix("").parts
    top = {id(node) for node in tree.body}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(parts[: len(parts) - node.level]) if node.level else ""
            stem = ".".join(filter(None, (base, node.module)))
            modules = [f"{stem}.{alias.name}" for alias in node.names]
        else:
            continue
        for module in modules:
            yield module, id(node) in top


# --- who imports whom ---------------------------------------------------------------------------------------------

SHARED = {"_extension", "_version"}
MAY_IMPORT = {
    "core": {"core"},
    "backends": {"backends", "core"},
    "losses": {"losses", "core"},
    "compat": {"compat", "losses", "core"},
    "models": {"models", "losses", "core"},
    "train": {"train", "models", "losses", "core"},
}
# What the losses, and a plain `import fused_nce`, must do without.
TORCH_ALONE = ("core", "backends", "losses")


def public_names():
    """What `import fused_nce` offers: the trainer and the command line stand above it, and may use it as anyone may."""
    names = {""}
    for folder in ("fused_nce", "fused_nce/losses"):
        (listed,) = re.findall(
            r"__all__ = (\[.*?\])", (ROOT / folder / "__init__.py").read_text(encoding="utf-8"), re.S
        )
        names |= set(ast.literal_eval(listed))
    return names


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_imports_go_one_way(path):
    part = path.relative_to(ROOT / "fused_nce").parts[0]
    if part.endswith(".py"):  # __init__, cli and doctor stand above all parts, the shared files below
        allowed = set() if path.stem in SHARED else {*MAY_IMPORT, "doctor", "grad_cache"} | public_names()
    else:
        assert part in MAY_IMPORT, f"no rule for fused_nce/{part}: add one to MAY_IMPORT"
        allowed = MAY_IMPORT[part] | (public_names() if part == "train" else set())
    for module, _ in imports_of(path):
        root, _, rest = module.partition(".")
        if root == "fused_nce":
            assert rest.partition(".")[0] in allowed | SHARED, f"{name_of(path)} imports {module}"


def is_trainer(path):
    return path.is_relative_to(ROOT / "fused_nce" / "train")  # has its extras


@pytest.mark.parametrize("path", [path for path in PACKAGE if not is_trainer(path)], ids=name_of)
def test_all_but_the_trainer_imports_torch_alone(path):
    inner = path.relative_to(ROOT / "fused_nce").parts[0] in TORCH_ALONE  # not even within a function
    outside = {module.partition(".")[0] for module, top in imports_of(path) if top or inner}
    allowed = {"torch", "fused_nce"} | ({"triton"} if path.parent.name == "flash" else set())
    assert outside - set(sys.stdlib_module_names) <= allowed


PROBE = """
import json, sys, time
import torch
{before}
present = set(sys.modules)
start = time.process_time()
import fused_nce
seconds = time.process_time() - start
brought = sorted(set(sys.modules) - present)
print(json.dumps(dict(seconds=seconds, brought=brought, cuda=torch.cuda.is_initialized())))
"""


def probe_import(before=""):
    code = PROBE.format(before=before)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_costs_half_a_second_at_most_beyond_torch():
    # Processor time, the best of three: the machine may be busy with other tests.
    assert min(probe_import()["seconds"] for _ in range(3)) < 0.5


def test_importing_brings_in_no_extra_and_no_cuda_context():
    # torch's own flop counter, in which the ops' formulas are registered, imports triton where it is installed.
    found = probe_import(before="import torch.utils.flop_counter")
    assert found["cuda"] is False
    roots = {name.partition(".")[0] for name in found["brought"]} - set(sys.stdlib_module_names)
    assert roots <= {"torch", "fused_nce"} | {name for name in roots if name.startswith("__editable__")}
    parts = {".".join(name.split(".")[:2]) for name in found["brought"]}
    assert not {name for name in found["brought"] if name.startswith("fused_nce.backends.flash")}
    assert not parts & {
        "torch._dynamo",
        "torch._inductor",
        "fused_nce.compat",
        "fused_nce.models",
        "fused_nce.train",
        "fused_nce._C",
    }


# --- files --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [path for path in FILES if path.suffix in CODE], ids=name_of)
def test_no_file_is_long(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE_LINES


def test_the_project_speaks_of_itself_alone():
    """No path of the machine it was written on, no number of a tracker that readers do not have."""
    here = [re.escape(f"{folder}/") for folder in {ROOT, ROOT.parent, Path.home()} if len(folder.parts) > 1]
    machine = [rf"(?<![\w.:/~-])/{folder}/\w" for folder in ("home", "root", "Users", "tmp", "mnt")]
    traces = re.compile("|".join([*here, *machine, r"\b[Ii]ssues? #?\d"]))
    found = []
    for path in FILES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if traces.search(line):
                found.append(f"{name_of(path)}:{number}: {line.strip()[:100]}")
    assert not found, "\n".join(found)


# --- versions -----------------------------------------------------------------------------------------------------


def locked():
    lines = (ROOT / "requirements.lock").read_text(encoding="utf-8").splitlines()
    pins = [line.partition(";")[0].strip() for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins), "requirements.lock holds nothing but pins"
    return dict(pin.split("==") for pin in pins)


@pytest.mark.parametrize("tool", ["ruff", "mypy"])
def test_the_linters_have_one_version_everywhere(tool):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    (declared,) = [line for line in project["optional-dependencies"]["dev"] if line.startswith(tool)]
    assert declared == f"{tool}=={locked()[tool]}"
    hooks = set(re.findall(rf'"({tool}[^"]*)"', (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")))
    assert hooks == {declared}
    ran = subprocess.run([sys.executable, "-m", tool, "--version"], capture_output=True, text=True, check=True).stdout
    assert ran.split()[1] == locked()[tool]


def test_the_lock_covers_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ("train", "eval", "plots", "shards", "bench", "dev")  # the others' parts come with their losses
    asked = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    names = {re.split(r"[^\w-]", line)[0].lower() for line in asked} - {"fused-nce"}
    assert names <= {name.lower() for name in locked()}


# --- documents ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", path.read_text(encoding="utf-8")):
        if "://" not in target and not target.startswith("mailto:"):
            assert (path.parent / target).exists(), f"{name_of(path)} links to {target}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_named_files_exist(path):
    places = [path.parent, ROOT, ROOT / "fused_nce"]
    for name in re.findall(
        r"`((?:[\w.-]+/)+[\w.-]+\.(?:py|cpp|h|inl|cu|md|json|toml|yaml|lock))`", path.read_text("utf-8")
    ):
        if name.partition("/")[0] not in ("runs", "RUN"):  # what a run will write
            assert any((place / name).exists() for place in places), f"{name_of(path)} names {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_named_make_targets_exist(path):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for words in re.findall(
        r"^\s*make ([a-z][a-z ]*?)\s*(?:#|$)|`make ([a-z ]+)`", path.read_text(encoding="utf-8"), re.M
    ):
        assert set(" ".join(words).split()) <= targets, f"{name_of(path)} names make {' '.join(words)}"


def test_the_makefile_runs_what_exists():
    for module in re.findall(r"\$\(PY\) -m (fused_nce\.\w+|bench|tests\.\w+)", (ROOT / "Makefile").read_text("utf-8")):
        path = ROOT / module.replace(".", "/")
        assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), f"make runs python -m {module}"


def examples_of(path):
    """The Python blocks of a document in order, each with the output block that follows it at once, if one does."""
    return re.findall(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", path.read_text(encoding="utf-8"), re.S)


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if examples_of(path)], ids=name_of)
def test_examples_run_and_print_what_they_say(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "example"}  # later blocks of a document go on from earlier ones
    for number, (code, expected) in enumerate(examples_of(path), 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"{name_of(path)}, example {number}", "exec"), names)
        if expected:
            assert printed.getvalue().strip() == expected.strip()


def test_the_readme_has_an_example():
    assert examples_of(ROOT / "README.md")
