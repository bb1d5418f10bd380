"""The house: import order, the chain of chapters, docstrings, and what is never imported.

Each check takes the root of a checkout and returns what is wrong there, one line a finding. So that none can
pass by looking at nothing, each is first shown a small package that breaks its rule.
"""

import ast
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Reading order = import order; the place in it is the chapter's number. Rooms that no issue has needed yet do
# not exist, and the chain passes them by.
METHOD = ["codebook", "reference", "quantize", "matmul", "nf4", "lora", "optim"]
TRANSFORMER = [
    "architecture",
    "attention",
    "model",
    "files",
    "checkpoint",
    "adapter",
    "template",
    "tokenizer",
]
TRANSFORMER += ["data", "batch", "check", "loss", "generate"]
CHAPTERS = [*METHOD, *TRANSFORMER, "memory", "run", "report", "parallel"]

PICKLES = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
PICKLES |= {"torch.load", "torch.save", "torch.hub"}
OUTSIDE = {"subprocess", "socket", "socketserver", "ssl", "http", "urllib", "ftplib", "smtplib", "xmlrpc"}
OUTSIDE |= {"requests", "httpx", "aiohttp", "urllib3", "websockets", "huggingface_hub"}
PEERS = ["bitsandbytes", "transformers", "peft", "torchao", "accelerate"]
JUNK_DRAWERS = {"utils.py", "common.py", "constants.py", "types.py", "helpers.py", "misc.py"}


def modules(root: Path, folder: str = "minqlora") -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((root / folder).rglob("*.py")):
        yield path.relative_to(root), ast.parse(path.read_text(encoding="utf-8"))


def rooms(root: Path) -> list[str]:
    """Return the chapters that exist, in reading order."""
    return [name for name in CHAPTERS if (root / "minqlora" / f"{name}.py").is_file()]


def imported(tree: ast.Module) -> Iterator[str]:
    """Yield the full name of all that is imported anywhere in a file, `from a import b` as `a.b`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = ".".join(filter(None, ["minqlora" if node.level else "", node.module]))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def misplaced_imports(root: Path) -> list[str]:
    wrong = []
    for path, tree in modules(root):
        if path.stem == "__init__":
            continue
        if path.stem not in CHAPTERS or len(path.parts) != 2:
            wrong.append(f"{path}: is no chapter of the house")
            continue
        above = CHAPTERS[: CHAPTERS.index(path.stem)]
        ours = [name.split(".") for name in imported(tree) if name.split(".")[0] == "minqlora"]
        wrong += [f"{path}: imports {'.'.join(name)}" for name in ours if not set(name[1:2]) & set(above)]
    return wrong


def broken_chain(root: Path) -> list[str]:
    wrong = []
    names = rooms(root)
    for before, name, after in zip([None, *names], names, [*names[1:], None], strict=False):
        path = Path("minqlora") / f"{name}.py"
        docstring = ast.get_docstring(ast.parse((root / path).read_text(encoding="utf-8"))) or ""
        number = CHAPTERS.index(name) + 1
        if not docstring.startswith(f"Chapter {number}. "):
            wrong.append(f"{path}: its docstring does not begin with `Chapter {number}. `")
        last = " ".join(docstring.split("\n\n")[-1].split())
        match = re.fullmatch(r"Before: (.+?)\.(?: Next: (.+)\.)?", last)
        if not match or (after and not match[2]):  # the last chapter may say no more than what is before it
            wrong.append(f"{path}: the last paragraph is not `Before: {before}. Next: {after}.` but `{last}`")
            continue
        for word, said, want in zip(("Before", "Next"), match.groups(), (before, after), strict=True):
            neighbour = re.findall(r"\w+", said or "nothing")[0]
            # The ends of the chain point out of the chapters, in whatever words.
            if neighbour != want and (want or neighbour in CHAPTERS):
                wrong.append(f"{path}: `{word}: {said}.`, where {want or 'no chapter'} stands")
    return wrong


def undocumented(root: Path) -> list[str]:
    """Look at every file, and in the package at public functions and classes; short methods need none."""
    wrong = []
    for folder in ("minqlora", "scripts"):
        for path, tree in modules(root, folder):
            if not ast.get_docstring(tree):
                wrong.append(f"{path}: no docstring")
            for node in ast.walk(tree) if folder == "minqlora" else ():
                if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    continue
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                public = not node.name.startswith("_") and (node in tree.body or lines > 6)
                if public and not ast.get_docstring(node):
                    wrong.append(f"{path}: {node.name} has no docstring")
    return wrong


def junk_drawers(root: Path) -> list[str]:
    folders = ("minqlora", "scripts", "tests")
    return [str(path) for folder in folders for path, _ in modules(root, folder) if path.name in JUNK_DRAWERS]


def unsafe_names(root: Path) -> list[str]:
    """Look for pickle in any form, and in the package also for the network and other processes."""
    wrong = []
    for folder, banned in [("minqlora", PICKLES | OUTSIDE), ("scripts", PICKLES)]:
        for path, tree in modules(root, folder):
            found = [name for name in imported(tree) if {name, name.split(".")[0]} & banned]
            attributes = [ast.unparse(node) for node in ast.walk(tree) if isinstance(node, ast.Attribute)]
            found += [name for name in attributes if name in banned]
            found += [node.arg for node in ast.walk(tree) if getattr(node, "arg", None) == "allow_pickle"]
            wrong += [f"{path}: {name}" for name in found]
    return wrong


def peers_pulled_in(root: Path) -> list[str]:
    # A process of its own, because tests beside this one import the peers.
    code = f"import sys, minqlora; print(*(name for name in {PEERS} if name in sys.modules))"
    environment = {**os.environ, "PYTHONPATH": str(root)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


CHECKS = [misplaced_imports, broken_chain, undocumented, junk_drawers, unsafe_names, peers_pulled_in]


@pytest.mark.parametrize("check", CHECKS)
def test_the_house_is_in_order(check: Callable[[Path], list[str]]):
    findings = check(ROOT)
    assert not findings, "\n".join(findings)


def test_the_checks_look_at_the_real_files():
    assert len(rooms(ROOT)) > 1
    assert all(any(modules(ROOT, folder)) for folder in ("minqlora", "scripts", "tests"))


# -- each check, on a package that breaks its rule ---------------------------------------------------------

SOUND = {
    "minqlora/__init__.py": '"""The equation."""\nfrom minqlora.nf4 import f\n',
    "minqlora/codebook.py": '"""Chapter 1. Levels.\n\nBefore: `__init__.py`. Next: quantize."""\n',
    "minqlora/quantize.py": '''"""Chapter 3. Blocks.

Before: codebook. Next: nf4.
"""
import math
from minqlora.codebook import x
from minqlora import codebook
''',
    "minqlora/nf4.py": '''"""Chapter 5. Tensor.

Before:
quantize. Next: the transformer.
"""
import minqlora.codebook
from .quantize import x

def f():
    """Return it."""

def _g(): ...
''',
    "scripts/demo.py": '"""Runs."""\nimport subprocess\n',
    "tests/test_nf4.py": "",
}


def house(folder: Path, path: str = "tests/test_x.py", text: str = "") -> Path:
    """Write the sound package with one file replaced or added; return its root."""
    for name, content in {**SOUND, path: text}.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    return folder


@pytest.mark.parametrize("check", CHECKS[:-1])
def test_a_sound_house_passes(check, tmp_path):
    assert check(house(tmp_path)) == []


@pytest.mark.parametrize(
    "line", ["import minqlora.nf4", "from minqlora.nf4 import x", "from minqlora import nf4"]
)
@pytest.mark.parametrize("indent", ["", "def f():\n    "])
def test_an_import_from_below_is_found(line, indent, tmp_path):
    root = house(tmp_path, "minqlora/quantize.py", indent + line)
    assert len(misplaced_imports(root)) == 1


@pytest.mark.parametrize(
    "line", ["from . import nf4", "from .nf4 import x", "from minqlora import NF4Tensor"]
)
def test_a_relative_import_and_one_of_the_public_names_are_found(line, tmp_path):
    assert len(misplaced_imports(house(tmp_path, "minqlora/quantize.py", line))) == 1
    assert len(misplaced_imports(house(tmp_path, "minqlora/quantize.py", "import minqlora"))) == 1


def test_a_module_without_a_chapter_is_found(tmp_path):
    root = house(tmp_path, "minqlora/trainer.py")
    assert misplaced_imports(root) == ["minqlora/trainer.py: is no chapter of the house"]


@pytest.mark.parametrize(
    "docstring",
    [
        "Blocks.\n\nBefore: codebook. Next: nf4.",
        "Chapter 2. Blocks.\n\nBefore: codebook. Next: nf4.",
        "Chapter 3. Blocks.\n\nBefore: reference. Next: nf4.",
        "Chapter 3. Blocks.\n\nBefore: codebook. Next: matmul.",
        "Chapter 3. Blocks.\n\nBefore: codebook. Next: the rest.",
        "Chapter 3. Blocks.\n\nBefore: codebook.",
        "Chapter 3. Blocks.\n\nBefore: codebook. Next: nf4.\n\nOne more thing.",
        "Chapter 3. Blocks.",
    ],
)
def test_a_break_in_the_chain_of_chapters_is_found(docstring, tmp_path):
    root = house(tmp_path, "minqlora/quantize.py", f'"""{docstring}\n"""\n')
    assert len(broken_chain(root)) == 1


def test_the_last_chapter_may_be_silent_on_what_comes_next(tmp_path):
    text = SOUND["minqlora/nf4.py"].replace(" Next: the transformer.", "")
    assert broken_chain(house(tmp_path, "minqlora/nf4.py", text)) == []


def test_a_chain_that_goes_on_past_its_end_is_found(tmp_path):
    text = SOUND["minqlora/nf4.py"].replace("the transformer", "lora")
    assert broken_chain(house(tmp_path, "minqlora/nf4.py", text)) == [
        "minqlora/nf4.py: `Next: lora.`, where no chapter stands"
    ]


@pytest.mark.parametrize(
    ("path", "text", "finding"),
    [
        ("minqlora/lora.py", "x = 1", "minqlora/lora.py: no docstring"),
        ("scripts/chat.py", "x = 1", "scripts/chat.py: no docstring"),
        ("minqlora/lora.py", '"""L."""\ndef merge(): ...', "minqlora/lora.py: merge has no docstring"),
        ("minqlora/lora.py", '"""L."""\nclass LoRA: ...', "minqlora/lora.py: LoRA has no docstring"),
        (
            "minqlora/lora.py",
            '"""L."""\nclass _C:\n    def merge(self):\n' + "        x = 1\n" * 6,
            "minqlora/lora.py: merge has no docstring",
        ),
    ],
)
def test_a_missing_docstring_is_found(path, text, finding, tmp_path):
    assert undocumented(house(tmp_path, path, text)) == [finding]


@pytest.mark.parametrize("path", ["minqlora/utils.py", "scripts/common.py", "tests/constants.py"])
def test_a_junk_drawer_is_found(path, tmp_path):
    assert junk_drawers(house(tmp_path, path)) == [path]


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("minqlora/run.py", "import pickle"),
        ("scripts/merge.py", "def f():\n    import pickle"),
        ("scripts/merge.py", "from pickle import loads"),
        ("minqlora/run.py", "import torch\ntorch.load('x')"),
        ("scripts/merge.py", "from torch import load"),
        ("scripts/merge.py", "np.load('x', allow_pickle=True)"),
        ("minqlora/run.py", "import subprocess"),
        ("minqlora/run.py", "from urllib.request import urlopen"),
        ("minqlora/run.py", "import socket"),
    ],
)
def test_pickle_and_the_network_are_found(path, text, tmp_path):
    assert len(unsafe_names(house(tmp_path, path, text))) == 1


def test_a_peer_that_the_package_imports_is_found(tmp_path):
    root = house(tmp_path, "minqlora/__init__.py", "import peft")
    (root / "peft.py").write_text("")
    assert peers_pulled_in(root) == ["peft"]
