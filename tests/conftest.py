"""Every test runs on one thread, from the same state of torch's global generator: quick and repeatable."""

import signal

import pytest
import torch

if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:  # as a shell starts what it runs in the background; the programs
    signal.signal(signal.SIGINT, signal.default_int_handler)  # that tests interrupt would inherit it


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)
