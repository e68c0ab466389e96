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
