# SPDX-License-Identifier: Apache-2.0
"""The recipes that were whole files are what the words that replace them say together."""

import re
from pathlib import Path

import pytest

from tunix_gemma4.settings.load_config import compose, find_recipe, read_yaml

FORMER = sorted((Path(__file__).parent / "former_recipes").glob("*/*.yaml"))


def test_all_are_compared():
    assert len(FORMER) == 51


@pytest.mark.parametrize("path", FORMER, ids=lambda path: path.stem)
def test_content_is_that_of_the_words(path):
    with pytest.raises(ValueError, match="recipes are composed") as answered:
        find_recipe(path.stem)
    words = re.search(r"write ([^;]*);", str(answered.value))[1].split()
    former, today = read_yaml(path.read_text()), compose(words)
    assert former.pop("output_dir") == f"outputs/{path.stem}"
    assert today.pop("output_dir") == f"outputs/{'_'.join(words)}"
    assert today == former
