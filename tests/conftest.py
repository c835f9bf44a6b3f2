"""Every test runs on one thread, from the same state of torch's global generator, with this project's modules in
sys.modules, which a user's network may take out: quick and repeatable."""

import signal
import sys

import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it runs in the background; the programs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # that tests interrupt would inherit it


@pytest.fixture(autouse=True)
def one_thread():
    before, path, modules = torch.get_num_threads(), [*sys.path], dict(sys.modules)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
    sys.path[:] = path
    sys.modules.update(modules)
