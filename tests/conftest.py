import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
torch.set_num_threads(1)  # tiny models: one thread is fastest, and repeats bit for bit


@pytest.fixture(scope="session")
def peers():
    """transformers, without network and noise."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        found = pytest.importorskip("transformers", reason="the peer that checkpoint folders are compared with")
        found.logging.set_verbosity_error()
        getattr(found.logging, "disable_progress_bar", lambda: None)()
        yield found
