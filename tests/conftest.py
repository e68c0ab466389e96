import os
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when train_gpt defines its kernels


@pytest.fixture(scope="session")
def root() -> Path:
    """The checkout."""
    return Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def corpus(root: Path) -> Path:
    """The corpus for measurements, which is no part of the project and lies beside it."""
    folder = root.parent / "shared" / "corpus"
    if not folder.is_dir():
        pytest.skip("needs the folder shared/corpus beside the checkout")
    return folder


LONGEST = ("kernels", "train_gpt_runs", "recipes", "ttt", "artifact", "submission", "report", "prepare_caseops_data")


def pytest_collection_modifyitems(items):
    """The files that take longest first: a worker takes a whole file, and none should be left alone at the end."""
    order = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
