"""A program of several processes: the first saves, without waiting for the others, and one process
or all of them restore."""

import os
import socket
import subprocess
import sys

import jax.numpy as jnp
import pytest

from gradhpo import GradhpoWarning, checkpoint

CHILD = """
import sys, time
import jax
rank, address, directory = int(sys.argv[1]), sys.argv[2], sys.argv[3]
jax.distributed.initialize(address, 2, rank)
import numpy as np
from gradhpo import checkpoint
state = {"w": np.arange(6.0, dtype=np.float32)}
if rank == 0:
    checkpoint.save(directory, state, step=1)
else:
    try:
        checkpoint.save(directory + "-other", state, step=1)
    except ValueError as error:
        print(error)
    while not checkpoint.steps(directory):  # no call of JAX's meanwhile: it is at other work
        time.sleep(0.1)
print(rank, checkpoint.restore(directory, state)["w"].sum())
"""


@pytest.mark.slow
@pytest.mark.faults
def test_25_first_process_of_several_saves_and_any_restores(tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    env = os.environ | {"JAX_PLATFORMS": "cpu"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", CHILD, str(rank), address, str(tmp_path / "run")],
            env=env,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [process.communicate(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert "0 15.0" in outputs[0][0] and "1 15.0" in outputs[1][0]
    assert "process 1 of 2 cannot write checkpoints" in outputs[1][0]
    w = {"w": jnp.zeros(6, jnp.float32)}
    with pytest.warns(GradhpoWarning, match="devices: 2 -> 1"):
        assert float(checkpoint.restore(tmp_path / "run", w)["w"].sum()) == 15
