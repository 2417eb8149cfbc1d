# SPDX-License-Identifier: Apache-2.0
"""README and docs are run: every Python block, every `tunix-gemma4` command, every link.

The blocks of one page run in order, in one namespace, in a directory that holds what the pages
name: `gemma-4-E2B-it/` (a tiny checkpoint), `train.jsonl` (conversations about the images in
`digits/`), and `configs/`. Where a page says that a block "prints" the text block after it, that
text is compared; `...` stands for anything.
"""

import contextlib
import dataclasses
import doctest
import importlib.util
import io
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

import tunix_gemma4
from tunix_gemma4 import LoraConfig, ModelConfig
from tunix_gemma4.checkpoint.names import named_buffers, named_parameters
from tunix_gemma4.model.gemma4 import abstract_model
from tunix_gemma4.settings.common import MeshConfig
from tunix_gemma4.settings.grpo import GrpoRunConfig, PromptConfig
from tunix_gemma4.settings.sft import DataConfig, RunConfig
from tunix_gemma4.testing.tiny import tiny_config

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)[^)]*\)")
NUM_IMAGES = 24


def page_id(page):
    return str(page.relative_to(ROOT))


def blocks(page):
    """(language, line of the fence, text before it, text) of each fenced block, in order."""
    text = page.read_text()
    end = 0
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield match[1], line, text[end : match.start()].strip(), match[2]
        end = match.end()


def runs(page):
    """Whether the page has Python or `tunix-gemma4` to run."""
    return any(
        language == "python" or (language == "sh" and "tunix-gemma4 " in text)
        for language, _, _, text in blocks(page)
    )


@pytest.fixture
def workplace(tiny_checkpoint, tmp_path, monkeypatch):
    """A directory as the pages assume it, entered."""
    from PIL import Image
    from sklearn.datasets import load_digits

    shutil.copytree(tiny_checkpoint("demo"), tmp_path / "gemma-4-E2B-it")
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    (tmp_path / "digits").mkdir()
    digits = load_digits()
    with (tmp_path / "train.jsonl").open("w") as out:
        for index in range(NUM_IMAGES):
            pixels = (digits.images[index] * (255 / 16)).astype("uint8")
            name = f"digits/{index}.png"
            Image.fromarray(pixels).save(tmp_path / name)
            messages = [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "image": name},
                        {"type": "text", "text": "What digit is this?"},
                    ],
                },
                {"role": "assistant", "content": str(digits.target[index])},
            ]
            out.write(json.dumps({"messages": messages}) + "\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    # Some pages register.
    tunix_gemma4.unregister()


def run_python(text, *, line, page, namespace):
    # Blank lines first, so that a traceback gives the line of the page.
    exec(compile("\n" * line + text, str(page), "exec"), namespace)


def run_shell(text):
    """Runs the `tunix-gemma4` commands; other commands install, and are not run here."""
    for command in text.replace("\\\n", " ").splitlines():
        if command.startswith("tunix-gemma4 "):
            from tunix_gemma4.__main__ import main

            assert not main(shlex.split(command, comments=True)[1:]), command


def assert_printed(found, expected):
    checker = doctest.OutputChecker()
    assert checker.check_output(expected, found, doctest.ELLIPSIS), f"{expected}\n!=\n{found}"


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=page_id)
def test_blocks_of_the_page_run(page, workplace):
    namespace = {"__name__": "__main__"}
    printed = io.StringIO()
    for language, line, before, text in blocks(page):
        if language == "text" and before == "prints":
            assert_printed(printed.getvalue(), text)
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if language == "python":
                run_python(text, line=line, page=page, namespace=namespace)
            elif language == "sh":
                run_shell(text)


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_of_the_page_lead_somewhere(page):
    targets = [link for link in LINK.findall(page.read_text()) if "://" not in link]
    assert not [link for link in targets if not (page.parent / link).exists()]


def anchors(page):
    """As GitHub makes them of headings; `make docs` looks at those of the site."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_into_a_page_lead_to_a_heading(page):
    links = re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", page.read_text())
    links = [(link, anchor) for link, anchor in links if "://" not in link]
    there = {link: anchors(page.parent / link if link else page) for link, _ in links}
    assert not [(link, anchor) for link, anchor in links if anchor not in there[link]]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_make_targets_named_by_the_page_exist(page):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`make (\w+)", page.read_text()))
    for language, _, _, text in blocks(page):
        if language == "sh":
            targets |= set(re.findall(r"^make (\w+)", text, re.MULTILINE))
    assert not [name for name in targets if not re.search(rf"^{name}:", makefile, re.MULTILINE)]


def test_readme_names_every_folder_of_the_package():
    readme = (ROOT / "README.md").read_text()
    package = ROOT / "tunix_gemma4"
    folders = {
        str(path.relative_to(package.parent))
        for path in package.rglob("*")
        if path.is_dir() and path.name != "__pycache__" and any(path.glob("*.*"))
        if path.parent.name != "_renamed"
    }
    assert not [name for name in sorted(folders) if f"`{name}/`" not in readme]


def test_tables_are_those_of_the_code():
    spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    old = [
        page.name for page in tables.pages() if page.read_text() != tables.page_with_tables(page)
    ]
    assert len(tables.pages()) == 2
    assert not old, f"`make docs-tables` writes them anew: {old}"


CONFIGS = [ModelConfig, LoraConfig, RunConfig, DataConfig, MeshConfig]
CONFIGS += [GrpoRunConfig, PromptConfig]


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_of_the_config_is_documented(config):
    text = (ROOT / "docs/reference/config.md").read_text()
    names = [field.name for field in dataclasses.fields(config)]
    assert not [name for name in names if f"`{name}`" not in text]


def test_every_tensor_of_the_five_sizes_is_in_the_table_of_names():
    """Also that no row of the table is without a tensor."""
    page = (ROOT / "docs/reference/weight_names.md").read_text()
    rows = re.findall(
        r"^\| `([^`]+)` \|.*\|$",
        page[page.index("## Text") : page.index("## Constants")],
        re.MULTILINE,
    )
    table = {pattern for row in rows for pattern in spelled_out(row)}
    used = set()
    for size in ("e2b", "e4b", "12b", "26b_a4b", "31b"):
        model = abstract_model(tiny_config(size))
        for name in [*named_parameters(model), *named_buffers(model)]:
            used.add(re.sub(r"layers\.\d+\.", "layers.{i}.", name))
    text = {f"model.language_model.{pattern}" for pattern in table}
    vision = {f"model.{pattern}" for pattern in table}
    assert used <= text | vision
    for pattern in table:
        assert {f"model.language_model.{pattern}", f"model.{pattern}"} & used, pattern


def spelled_out(row):
    """`a.{q,k}_b` as `a.q_b` and `a.k_b`; `{i}` stays."""
    choice = re.search(r"\{([^}]*,[^}]*)\}", row)
    if choice is None:
        return [row]
    return [
        name
        for word in choice[1].split(",")
        for name in spelled_out(row[: choice.start()] + word + row[choice.end() :])
    ]
