"""What stands in several files stands there on purpose, identical to the character."""

import ast

import pytest
from conftest import METHODS, ROOT

# They belong to the methods of several papers, and every file works alone: changed in one file,
# they are changed in all.
COPIES = {"LARS", "cosine_schedule", "stepwise_schedule", "ema_update", "without_dropout", "spread",
          "solved", "PatchEmbed", "Attention", "Block", "positions"}

# The same idea in every file, each time in its own way.
OWN = {"augment", "make_optimizer", "train", "parse_args", "ViT", "positive_found"}


def definitions():
    """-> {name: {file: source}} of all top-level functions and classes of the methods."""
    found = {}
    for path in [ROOT / f"{name}.py" for name in METHODS]:
        lines = path.read_text(encoding="utf8").splitlines()
        for node in ast.parse("\n".join(lines)).body:
            if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                continue
            first = node.lineno
            if node.decorator_list:
                first = node.decorator_list[0].lineno
            source = "\n".join(lines[first - 1 : node.end_lineno])
            found.setdefault(node.name, {})[path.name] = source
    return found


SHARED = {name: files for name, files in definitions().items() if len(files) > 1}


@pytest.mark.parametrize("name", sorted(COPIES))
def test_copies_are_identical(name):
    (first, expected), *others = SHARED[name].items()
    for file, source in others:
        assert source == expected, f"{name} in {file} is not that in {first}"


def test_no_other_name_stands_in_several_files():
    """Neither by chance, nor as a copy that could drift."""
    others = SHARED.keys() - COPIES - OWN
    assert not {name: [*SHARED[name]] for name in others}


def test_barlow_has_the_augmentation_of_byol_and_byol_the_optimizer_of_simclr():
    assert SHARED["augment"]["barlow.py"] == SHARED["augment"]["byol.py"]
    assert SHARED["make_optimizer"]["byol.py"] == SHARED["make_optimizer"]["simclr.py"]


def test_what_is_compared_is_the_whole_definition():
    assert SHARED["LARS"]["simclr.py"].startswith("class LARS(torch.optim.Optimizer):")
    assert SHARED["LARS"]["simclr.py"].endswith("\n        return loss")
    assert SHARED["ema_update"]["byol.py"].startswith("@torch.no_grad()\ndef ema_update(")
