"""The mirror trained on several GPUs."""

import numpy as np
import pytest

from tests.port_torch.small_training import TINY, losses
from tests.train_tpu.processes import make_text, run, without

pytestmark = pytest.mark.gpu


@pytest.mark.two_gpus
def test_two_gpus_make_the_run_of_one(tmp_path):
    """Apart by no more than the rounding of bfloat16, which another order of sums on one GPU shows."""
    arguments = (*without(TINY, "--dropout"), "--batch", "8", "--data", make_text(tmp_path))
    one, parts, two = (tmp_path / name for name in ("one", "parts", "two"))
    alone = {"environ": {"CUDA_VISIBLE_DEVICES": "0"}, "module": "port_torch.train"}
    run(tmp_path, *arguments, "--out", one, **alone)
    run(tmp_path, *arguments, "--grad-accum-steps", "4", "--out", parts, **alone)
    launch = ("--standalone", "--nproc-per-node", "2", "-m", "port_torch.train")
    out, _ = run(tmp_path, *launch, *arguments, "--out", two, module="torch.distributed.run")
    assert out.count("starting a new run") == 1
    curves = [np.array(losses(folder))[:, 1] for folder in (one, parts, two)]
    noise, apart = (np.abs(curve - curves[0]).max() for curve in curves[1:])
    assert apart <= 4 * noise + 1e-3 and curves[2][-1] < curves[2][0], (noise, apart)
