"""One random GPT-2 and its tokenizer, made once."""

import pytest
import torch

from genlm_bytes_smc.lm.transformer import TreeTransformer
from tests.lm.families import make_model, make_tokenizer


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    """Models this small only lose time to threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def gpt2():
    return make_model("gpt2")


@pytest.fixture
def engine(gpt2, tokenizer):
    return TreeTransformer(gpt2, tokenizer)
