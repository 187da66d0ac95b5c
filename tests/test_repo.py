"""The house rules that a machine can hold: who imports whom, what an import costs, that documents tell the truth."""

import ast
import contextlib
import fnmatch
import graphlib
import io
import json
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:  # pytest brings it to 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FILE_LINES = 500  # with one subject each
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

SHARED = {"_extension", "_nvcc", "_version", "measure", "mining"}
MAY_IMPORT = {
    "bench": {"bench", "losses", "core"},
    "core": {"core"},
    "backends": {"backends", "core"},
    "losses": {"losses", "core"},
    "compat": {"compat", "distributed", "losses", "core"},
    "models": {"models", "losses", "core"},
    "train": {"train", "distributed", "models", "losses", "core"},
}


def public_names():
    """What `import fused_nce` offers: the trainer and the command line stand above it, and may use it as anyone may."""
    texts = ((ROOT / folder / "__init__.py").read_text("utf-8") for folder in ("fused_nce", "fused_nce/losses"))
    return {""}.union(*(ast.literal_eval(re.findall(r"__all__ = (\[.*?\])", text, re.S)[0]) for text in texts))


def test_imports_go_one_way():
    wrong = []
    for path in PACKAGE:
        part = path.relative_to(ROOT / "fused_nce").parts[0]
        if part.endswith(".py"):  # __init__, cli and doctor stand above all parts, the shared files below
            shared = {"core"} if path.stem == "mining" else set()  # which tiles too
            allowed = shared if path.stem in SHARED else {*MAY_IMPORT, "doctor", "grad_cache"} | public_names()
        else:
            assert part in MAY_IMPORT, f"no rule for fused_nce/{part}: add one to MAY_IMPORT"
            allowed = MAY_IMPORT[part] | (public_names() if part in ("train", "bench") else set())
        for module, _ in imports_of(path):
            root, _, rest = module.partition(".")
            if root == "fused_nce" and rest.partition(".")[0] not in allowed | SHARED:
                wrong.append(f"{name_of(path)} imports {module}")
    assert not wrong, "\n".join(wrong)


# Modules that another loads by name, and that import it or what imports it.
BY_NAME = {
    "fused_nce.backends.triton": "fused_nce.backends.triton.whole",  # its second backward is an op's, of any backend
    "fused_nce.train.methods": "fused_nce.train.methods.distil",  # its teacher is a run of any method
}


def arrows():
    """Module → the modules of the package that it imports, wherever in the file: in functions and for types too."""
    modules = {".".join(x.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): x for x in PACKAGE}
    found = {}
    for name, path in modules.items():
        targets = {next((m for m in (x, x.rpartition(".")[0]) if m in modules), name) for x, _ in imports_of(path)}
        named = (x for x in named_to_import(path, name) if x.startswith("fused_nce."))
        targets |= {m for x in named for m in fnmatch.filter(modules, x) if m.count(".") == x.count(".")}
        found[name] = targets - {name, BY_NAME.get(name)}
    return found


def named_to_import(path, module):
    """What a file may hand to `import_module`, `*` for what is known at run time; of a variable, any of its strings."""
    nodes = list(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))
    calls = [x for x in nodes if isinstance(x, ast.Call) and ast.unparse(x.func).endswith("import_module")]
    for given in (call.args[0] for call in calls):
        if isinstance(given, ast.JoinedStr):
            named = ast.unparse(given)[2:-1].replace("{__name__}", module)
            yield re.sub(r"{\w+}", "*", named)
        else:
            yield from (x.value for x in nodes if isinstance(x, ast.Constant) and isinstance(x.value, str))


def test_no_import_goes_round_in_a_circle():
    graphlib.TopologicalSorter(arrows()).prepare()  # raises with a circle's modules


ABOVE = r"command|compare|config|evaluate|export|loop|method|methods|monitor|options|report|saving|step|teacher"
ROOMS = {  # what no file of a folder imports
    "bench": r"fused_nce\.train",
    "fused_nce": "bench",
    "fused_nce/train/data": rf"fused_nce\.(models|losses|train\.({ABOVE}|evaluation|settings\.(?!AugmentConfig\b)\w+))",
    "fused_nce/train/evaluation": rf"fused_nce\.train\.({ABOVE}|files\.write_\w+)",
    "fused_nce/train/report": r"numpy|sklearn|torch|fused_nce\.(core|losses|train\.(data|loop|step))",
}
WRITES = (
    r"(.*\.)?(dump|mkdir|makedirs|open|save(?!\(buffer\b)|save_file|savefig|savez\w*|savetxt|tofile|copy2|copyfile|touch"
    r"|write_\w+)\([^\n]*\)"
)


def test_rooms_keep_to_their_work():
    wrong = []
    for room, path in ((room, path) for room in ROOMS for path in FILES if path.is_relative_to(ROOT / room)):
        if path.suffix == ".py":
            found = [x for x, _ in imports_of(path) if re.match(rf"({ROOMS[room]})(\.|$)", x)]
            if room.endswith("evaluation"):  # which writes nothing
                nodes = ast.walk(ast.parse(path.read_text("utf-8")))
                found += [x for x in map(ast.unparse, nodes) if re.fullmatch(WRITES, x, re.S)]
            wrong += [f"{name_of(path)}: {x}" for x in found]
    assert not wrong, "\n".join(wrong)


def test_all_but_the_trainer_imports_torch_alone():
    wrong = []
    for path in PACKAGE:
        part = path.relative_to(ROOT / "fused_nce").parts[0]
        if part != "train":  # has its extras
            inner = part in ("core", "backends", "losses")  # not even within a function
            outside = {module.partition(".")[0] for module, top in imports_of(path) if top or inner}
            allowed = {"torch", "fused_nce"} | ({"triton"} if path.parent.name == "triton" else set())
            if part == "compat":
                allowed |= {path.stem}  # a class that is made of upstream's own
            if more := outside - set(sys.stdlib_module_names) - allowed:
                wrong.append(f"{name_of(path)} imports {sorted(more)}")
    assert not wrong, "\n".join(wrong)


# torch's own flop counter, in which the ops' formulas are registered, imports triton where it is installed.
PROBE = """
import json, sys, time
import torch
start = time.process_time()
import torch.utils.flop_counter
present = set(sys.modules)
import fused_nce
seconds = time.process_time() - start
brought = sorted(set(sys.modules) - present)
fused_nce.info_nce(torch.eye(4, requires_grad=True), torch.ones(4, 4)).loss.backward()
grouped = [name for name in sys.modules if name.startswith("fused_nce.core.distributed")]
print(json.dumps(dict(seconds=seconds, brought=brought, cuda=torch.cuda.is_initialized(), grouped=grouped)))
"""


def probe_import():
    done = subprocess.run([sys.executable, "-c", PROBE], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_importing_costs_half_a_second_at_most_beyond_torch_and_brings_no_extra_group_or_cuda_context():
    found = probe_import()
    # Processor time, up to three tries: the machine may be busy with other tests.
    assert found["seconds"] < 0.5 or any(probe_import()["seconds"] < 0.5 for _ in range(2))
    assert found["cuda"] is False
    assert found["grouped"] == []  # by a loss without a group
    roots = {name.partition(".")[0] for name in found["brought"]} - set(sys.stdlib_module_names)
    assert roots <= {"torch", "fused_nce"} | {name for name in roots if name.startswith("__editable__")}
    parts = {".".join(name.split(".")[:2]) for name in found["brought"]}
    unwanted = {f"fused_nce.{part}" for part in ("compat", "models", "train", "_C")}
    assert not parts & {"torch._dynamo", "torch._inductor", *unwanted}
    assert not [name for name in found["brought"] if name.startswith("fused_nce.backends.triton")]


# --- files --------------------------------------------------------------------------------------------------------


def test_no_file_is_long():
    lines = {name_of(path): len(path.read_text("utf-8").splitlines()) for path in FILES if path.suffix in CODE}
    assert {name: n for name, n in lines.items() if n > LONGEST_FILE_LINES} == {}


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


def test_the_linters_have_one_version_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    for tool in ("ruff", "mypy", "clang-format", "clang-tidy"):
        (declared,) = [line for line in project["optional-dependencies"]["dev"] if line.startswith(tool)]
        assert declared == f"{tool}=={locked()[tool]}"
        hooked = set() if tool == "clang-tidy" else {declared}  # which needs torch's headers
        assert set(re.findall(rf'"({tool}[^"]*)"', hooks)) == hooked
        assert metadata.version(tool) == locked()[tool]


def test_the_lock_covers_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = ("train", "eval", "plots", "shards", "bench", "docs", "release", "dev")  # the others' are optional
    asked = [*project["dependencies"], *(line for extra in extras for line in project["optional-dependencies"][extra])]
    names = {re.split(r"[^\w-]", line)[0].lower() for line in asked} - {"fused-nce"}
    assert names <= {name.lower() for name in locked()}


# --- documents ----------------------------------------------------------------------------------------------------


INSTALLS = re.compile(r"pip install (?:-\S+ )*['\"]?fused[-_]nce\b[^\n]*")
NAMED = re.compile(r"`((?:[\w.-]+/)+[\w.-]*)`")
FILE = re.compile(r".*\.(?:py|cpp|h|inl|cu|md|json|toml|yaml|lock)")


def test_links_and_named_files_and_make_targets_exist():
    wrong = []
    folders = {name_of(path).partition("/")[0] for path in FILES if path.parent != ROOT}
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        links = [(x, [path.parent]) for x in re.findall(r"\]\(([^)#\s]+)[^)]*\)", text) if not re.match(r"\w+:", x)]
        places = [path.parent, ROOT, ROOT / "fused_nce"]
        of = [(x, x.partition("/")[0]) for x in NAMED.findall(text)]
        # What begins with a folder of the project stands there, file or folder; other files may be named from nearby.
        named = [(x, [ROOT]) for x, top in of if top in folders]
        named += [(x, places) for x, top in of if FILE.fullmatch(x) and top not in {"runs", "RUN", *folders}]
        wrong += [f"{name_of(path)}: {x}" for x, near in (*links, *named) if not any((p / x).exists() for p in near)]
        for words in re.findall(r"^\s*make ([a-z][a-z -]*?)\s*(?:#|$)|`make ([a-z -]+)`", text, re.M):
            wrong += [f"{name_of(path)}: make {x}" for x in set(" ".join(words).split()) - targets]
    assert not wrong, "\n".join(wrong)


def test_no_line_installs_this_package_from_an_index_that_has_it_not():
    """It would install a stranger's; `docs/packages.md` says that there is none yet."""
    texts = {path: path.read_text(encoding="utf-8") for path in FILES if path.name != "CHANGELOG.md"}
    lines = [f"{name_of(path)}: {x}" for path, text in texts.items() for x in re.findall(INSTALLS, text)]
    assert not lines, "\n".join(lines)
    assert "Nothing is on a package index yet" in texts[ROOT / "docs/packages.md"]


def test_the_makefile_runs_what_exists():
    text = (ROOT / "Makefile").read_text("utf-8")
    for module in re.findall(r"\$\(PY\) -m (fused_nce\.\w+|bench|tests(?:\.\w+)+)", text):
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


def test_the_readme_is_short_and_has_an_example():
    assert examples_of(ROOT / "README.md")
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) < 150


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs the docs extra, which requirements.lock pins")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    built = {path.relative_to(tmp_path).parent.as_posix() for path in tmp_path.rglob("index.html")}
    pages = {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert pages <= built
    assert len([page for page in built if page.startswith("dropin/")]) >= 9  # one a library of docs/migrating.md
    texts = {page: (tmp_path / page / "index.html").read_text(encoding="utf-8") for page in built}
    assert "amdim_nce" in texts["api"]
    assert [page for page, text in texts.items() if "```" in text] == []  # a fence that the site does not know
